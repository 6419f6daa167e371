"""Shell scripts are read as bash reads them, without running anything."""

import subprocess

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from launcher.migrate.shell import read_script

NAMES = ["A", "B_1", "LONG_NAME"]
plain = st.text("abc01._/,:=+-", min_size=1, max_size=6)
spaced = st.text("ab \t1", max_size=8)
number = st.integers(0, 50)


@st.composite
def words(draw) -> str:
    """One word as a script writes it: plain, quoted, variables, arithmetic, or some of them joined."""
    name = draw(st.sampled_from(NAMES))
    pieces = st.one_of(
        plain,
        spaced.map(lambda text: f"'{text}'"),
        spaced.map(lambda text: f'"{text}"'),
        st.sampled_from(
            [
                f"${name}",
                f"${{{name}}}",
                f'"${name}"',
                f'"x ${{{name}}} y"',
                f"${{{name}:-d}}",
                f"'${name}'",
                r"\ ",
                r"\$A",
                '"\\$A\\\\"',
            ]
        ),
        st.tuples(number, number, st.sampled_from("+-*")).map(lambda it: f"$(({it[0]} {it[2]} {it[1]}))"),
        st.just("$(( ($N + 2) * ${N} / 3 ))"),
        st.just('"a \\\n   b"'),
    )
    return "".join(draw(st.lists(pieces, min_size=1, max_size=3)))


@st.composite
def scripts(draw) -> str:
    """Assignments, ifs, comments and continued lines, and at the end a command with words."""
    lines = ["N=7", *(f"{name}={draw(words())}" for name in NAMES)]
    for _ in range(draw(st.integers(0, 4))):
        name, value, other = draw(st.sampled_from(NAMES)), draw(words()), draw(plain)
        lines.append(draw(st.sampled_from([
            f"export {name}={value}", f"{name}={value}  # a comment", f'if [ "${name}" == "{other}" ]; then {name}=y; else {name}={value}; fi',
            f"if [ $N -gt {draw(number)} ] && [ $N != 7 ]; then\n  {name}=z\nelif [ -n \"${name}\" ]; then\n  {name}={other}\nfi",
            f"{name}+={value}", f"ARR=( {value} \\\n x{value} # c\n )", "# nothing; at all", f"W=1 {name}={value} true; N=$(($N+1))",
        ])))  # fmt: skip
    lines.insert(0, "ARR=(one)")
    tail = " ".join(draw(st.lists(words(), max_size=4)))
    return "\n".join([*lines, f'show first {tail} \\\n   "${{ARR[@]}}" ${{ARR[@]}} last'])


@settings(max_examples=60, deadline=None)
@given(scripts())
def test_words_are_those_that_bash_makes(script):
    function = "set -u; show() { printf '%s\\0' show \"$@\"; }\n"
    bash = subprocess.run(["bash", "-c", function + script], capture_output=True, text=True)
    assume(bash.returncode == 0)  # `$A` with a letter behind it is another variable, that nothing sets
    read = read_script(script)
    assert read.commands[-1].words == bash.stdout.split("\0")[:-1]
    assert not read.notes


def words_of(script: str, **options) -> list[list[str]]:
    return [command.words for command in read_script(script, **options).commands]


@pytest.mark.parametrize(("script", "words"), [
    ("run $UNSET ${UNSET}x $RANDOM", ["run", "$UNSET", "$UNSETx", "$RANDOM"]),
    ("run $(date +%s) `hostname`", ["run", "$(date +%s)", "`hostname`"]),
    ("X=<Specify path>\nrun --a $X --b <Specify the file>_text", ["run", "--a", "<Specify_path>", "--b", "<Specify_the_file>_text"]),
    ("run a > log.txt 2>&1 &", ["run", "a"]),
    ("run a 2>&1 | tee log.txt", ["run", "a"]),
    ("root@instance-x:/workspace/Megatron-LM# run a \\\n  b", ["run", "a", "b"]),
    ("run a \\  \n  b", ["run", "a", "b"]),
    ("run $1 \"${2}\" \"$@\"", ["run", "one", "t w o", "one", "t w o"]),
    ('shift\nrun $# "$1" "$@"', ["run", "1", "t w o", "t w o"]),
    ("shift 2\nrun $# $1 $@", ["run", "0", "$1"]),
    ('run "$#" "$*"', ["run", "2", "one t w o"]),
    ("ARGS=(--a 1 --b '2 3')\nARGS+=(--c)\nrun ${ARGS[@]:-}\nrun \"${ARGS[@]}\"", ["run", "--a", "1", "--b", "2 3", "--c"]),
])  # fmt: skip
def test_what_nothing_sets_stays_as_it_is_written(script, words):
    assert words_of(script, arguments=["one", "t w o"])[-1] == words


@pytest.mark.parametrize("words", ['"$@"', "$@", '"$*"', "$*", '"a$@"', '"$@$@"', '"$#"', '""$@', '"${EMPTY[@]}"', "${EMPTY[@]}", '"$@" last'])
def test_no_arguments_are_no_words(words):
    script = f"EMPTY=()\nshow first {words}"
    bash = subprocess.run(["bash", "-c", "show() { printf '%s\\0' show \"$@\"; }\n" + script], capture_output=True, text=True)
    assert words_of(script)[-1] == bash.stdout.split("\0")[:-1]


CASE = """
case "$1" in
  51b|"51B") A=one
    ;;
  2*)
    if [ "$1" == 2b ]; then A=two; else A=other; fi;;
  (x | y) A=three ;;
  *) A=four
esac
case $A in two) case b in a) A=no;; b) A=${A}_b;; esac;; t*) A=t; A=${A}t;; esac
run $A
"""


@pytest.mark.parametrize("word", ["51b", "51B", "2b", "2c", "x", "y", "", "z*"])
def test_case_takes_the_branch_that_bash_takes(word):
    bash = subprocess.run(["bash", "-c", "run() { echo $1; }\n" + CASE, "bash", word], capture_output=True, text=True, check=True)
    read = read_script(CASE, arguments=[word])
    assert read.commands[-1].words == ["run", bash.stdout.strip()]
    assert not read.notes


@pytest.mark.parametrize(("script", "line"), [
    ("A=1\nfor i in 1 2; do\n  run $i\ndone\nrun last", 2),
    ("f() {\n  run inside\n}\nrun last", 1),
    ("function f {\n  run inside\n}\nrun last", 1),
    ("\n\ncase $A in\n  a) run a;;\nesac\nrun last", 3),
    ("if grep -q x /etc/hosts; then\n  run inside\nfi\nrun last", 1),
    ("while true; do for i in 1; do run x; done; done\nrun last", 1),
    ("run first \\ \n last", 1),
])  # fmt: skip
def test_what_is_not_understood_is_named_with_its_line(script, line):
    read = read_script(script)
    assert [number for number, _ in read.notes] == [line]
    assert read.commands[-1].words[-1] == "last"
    assert not any("inside" in command.words for command in read.commands)
