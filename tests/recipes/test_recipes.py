"""Every recipe that comes with yuan: it composes, passes its own check at its own world size, and says how it is used."""

import re
import shlex
import socket
from importlib.util import find_spec
from itertools import takewhile

import pytest

from launcher.recipe import load
from launcher.recipe.check import CHECKS, check
from launcher.recipe.find import describe, package_folder
from launcher.recipe.verb import verb_of
from tests.test_readme import parse

FILES = {path.stem: path for path in sorted(package_folder().glob("*.yaml"))}
EXPECTED = (  # of another machine's, and candid
    "want a GPU each",
    "wants a GPU",
    "no filtered attention",
    "more checkpoint",
    "of 430000 steps of decay",  # Megatron-LM's own example of 345M
)


def comments(path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return list(takewhile(lambda line: line.startswith("#"), lines))


@pytest.mark.parametrize("name", FILES)
def test_it_passes_its_own_check_where_its_files_are(name, stand_in):
    words = [f"recipe={name}"] + ["generate.input=pred_input.jsonl"] * (name == "generate")
    if name.startswith("serve"):
        with socket.create_server(("127.0.0.1", 0)) as free:
            words.append(f"serve.port={free.getsockname()[1]}")
    stand_in(load(words))
    loaded = load(words)
    problems = check(loaded.recipe, loaded.sources, verb_of(loaded))
    expected = EXPECTED + ("a process needs",) * (loaded.recipe.derived.device == "cpu")  # of this machine's memory
    unexpected = [p for p in problems if p.severity == "error" or not any(words in p.what for words in expected)]
    assert not unexpected, "\n".join(str(p.as_error()) for p in unexpected)


@pytest.mark.parametrize("name", FILES)
def test_it_begins_with_what_it_is_the_command_and_what_that_needs(name):
    first, command, *rest = comments(FILES[name])
    assert re.fullmatch(r"# \S.*[^.]", first)
    loaded, text = load([f"recipe={name}"]), "\n".join(rest)
    for line in command.removeprefix("#   ").split(" && "):
        words = shlex.split(line)
        assert words[0] == "yuan" and words[1] in CHECKS
        if find_spec(f"launcher.commands.{words[1]}"):
            parse(words[1:])
    assert (f"recipe={name}" in words) is (name not in ("preprocess", "generate"))
    assert words[1] == verb_of(loaded) == describe(FILES[name])[1]
    assert rest[0].startswith("#   needs: ")
    r = loaded.recipe
    named = (r.data.data_path, r.data.train, r.data.valid, r.checkpoint.load, r.generate.load, r.convert.source)
    if "yuan preprocess" in command:
        named = (r.preprocess.input,)  # of which the command makes the data
    assert [path for path in named if path and path not in text and "make quickstart" not in text] == []
    if r.launch.device == "cuda" and words[1] not in ("convert", "preprocess"):
        count = f"{r.derived.world_size} GPU{'s' * (r.derived.world_size > 1)}"
        assert count in first and f"{count} of {r.launch.gpu_memory_gib:g} GiB" in text


@pytest.mark.parametrize("path", sorted(package_folder().glob("**/*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_that_its_comments_name_are_there(path):
    text = "\n".join(comments(path))
    bases = [word for line in comments(path)[1:2] if "a base" in line for word in re.findall(r"\b(?:bases/)?\w+\d\w*\b", line)]
    for name in re.findall(r"recipe=(\w+)", text) + bases:
        assert load([f"recipe={name}"]).recipe, name


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith(("generate_", "serve_", "convert_"))])
def test_it_holds_no_model_of_its_own(name):
    """A size's model is in one file."""
    sources = load([f"recipe={name}"]).sources
    files = {source for key, source in sources.items() if key.startswith("model.") and source not in ("default", "derived")}
    assert all(re.fullmatch(r"recipes/bases/(llama2|yuan2)(_\d+b)?\.yaml", file) for file in files)
