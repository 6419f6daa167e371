"""Completion: what is offered, and that real shells take it as it is meant."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.cli import VERBS, app
from launcher.completion import candidates
from tests.launcher.test_cli import yuan

BIN = Path(sys.executable).parent


def offered(line: str) -> list[str]:
    return [word for word, _ in candidates(app, line.split(" "))]


def test_verbs_and_their_verbs():
    assert offered("yuan ") == list(VERBS)
    assert offered("yuan pre") == ["preprocess", "pretrain"]
    assert offered("yuan recipes ") == ["list", "show", "copy", "keys"]
    assert "--install-completion" in offered("yuan --")


def test_options_of_a_verb():
    assert {"--dry-run", "--accept-changes", "--help"} <= set(offered("yuan pretrain recipe=345m_1dp --"))
    assert offered("yuan preprocess --input ") == []  # a file: the shell's own
    assert offered("yuan check --for ge") == ["generate"] and "pretrain" in offered("yuan check --for ")
    assert offered("yuan recipes show --as m") == ["megatron"]


def test_recipes():
    assert set(offered("yuan pretrain recipe=345m_")) == {"recipe=345m_1dp", "recipe=345m_4dp"}
    assert set(offered("yuan recipes show 345m_")) == set(offered("yuan recipes copy 345m_")) == {"345m_1dp", "345m_4dp"}
    assert offered("yuan check recipe=bases/llama2_7") == ["recipe=bases/llama2_7b", "recipe=bases/llama2_70b"]
    assert "recipe=bases/yuan2" in offered("yuan check recipe=bases/")
    assert offered("yuan recipes show 345m_1dp training.train_it") == ["training.train_iters="]


def test_keys_and_values():
    assert offered("yuan check rec") == ["recipe="]
    assert offered("yuan pretrain recipe=345m_1dp tr") == ["training."]
    assert {"training.seq_length=", "training.seed="} <= set(offered("yuan pretrain training.se"))
    assert offered("yuan pretrain training.precision=") == [f"training.precision={kind}" for kind in ("fp32", "bf16", "fp16")]
    assert offered("yuan pretrain model.swiglu=t") == ["model.swiglu=true"]
    assert offered("yuan pretrain data.data_path=") == []  # a file
    assert offered("yuan pretrain derived.") == [] and "derived." not in offered("yuan pretrain d")
    assert offered("yuan recipes keys optim") == ["optimizer"]


def test_what_is_not_there_offers_nothing():
    assert offered("yuan nothing pre") == offered("yuan pretrain nowhere.x") == []


def test_it_is_torch_free_and_a_users_recipe_is_offered(tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("# my own\n")
    code = "import sys, launcher.cli; launcher.cli.main(); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code, "yuan pretrain recipe=mi"], cwd=tmp_path, env=os.environ | {"YUAN_COMPLETE": "fish"}, capture_output=True, text=True)
    assert run.stdout.splitlines() == ["recipe=mine\tmy own", "False"]


@pytest.mark.parametrize(("shell", "start"), [("bash", ".bashrc"), ("zsh", ".zshrc"), ("fish", None)])
def test_install(shell, start, tmp_path, monkeypatch):
    import shellingham

    from launcher.completion_scripts import install

    monkeypatch.setattr(shellingham, "detect_shell", lambda: (shell, f"/bin/{shell}"))
    monkeypatch.setenv("HOME", str(tmp_path))
    if start:
        (tmp_path / start).write_text("alias x=y")
    for _ in range(2):
        assert f"completion for {shell}: " in install()
    if start:
        assert (tmp_path / start).read_text() == f"alias x=y\n# completion of yuan\nsource {tmp_path}/.config/yuan/completion.{shell}\n"
    else:
        assert (tmp_path / ".config/fish/completions/yuan.fish").is_file()


def test_an_unknown_shell(monkeypatch):
    import shellingham

    from launcher.completion_scripts import script
    from launcher.errors import UserError

    monkeypatch.setattr(shellingham, "detect_shell", lambda: ("tcsh", "/bin/tcsh"))
    with pytest.raises(UserError, match="no completion for tcsh"):
        script()


class Terminal:
    """A shell on a terminal, with yuan's completion read."""

    COMMANDS = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"], "fish": ["fish", "--no-config", "-i"]}

    def __init__(self, shell: str, folder: Path):
        from launcher.completion_scripts import SCRIPTS

        (folder / "script").write_text(SCRIPTS[shell])
        self.folder = folder
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            env = {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(folder), "TERM": "xterm", "PS1": "$ ", "LANG": "C.UTF-8"}
            os.execvpe(shell, self.COMMANDS[shell], env)
        self.settle(0.5)
        self.type("source ./script\n")

    def settle(self, quiet: float = 0.1) -> None:
        """Read what is printed until nothing more has come for `quiet` seconds."""
        text = b""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and select.select([self.file], [], [], quiet)[0]:
            try:
                text += os.read(self.file, 65536)
            except OSError:
                break
        if b"\x1b[c" in text or b"\x1b[0c" in text:  # fish asks what terminal this is
            os.write(self.file, b"\x1b[?62;c")

    def type(self, keys: str) -> None:
        os.write(self.file, keys.encode())
        self.settle()

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 20
        while not (self.folder / name).exists() and time.monotonic() < deadline:
            self.settle(0.05)

    def completed(self, line: str) -> str:
        """The line that TAB makes of `line`, as the command sees it, its words between bars."""
        for name in ("yuan_was_asked", "yuan_was_given"):
            (self.folder / name).unlink(missing_ok=True)
        os.write(self.file, (line + "\t").encode())
        self.wait_for("yuan_was_asked")
        self.type("")
        self.type("END\n")
        self.wait_for("yuan_was_given")
        return (self.folder / "yuan_was_given").read_text().strip()

    def close(self) -> None:
        os.close(self.file)
        os.kill(self.pid, 9)
        os.waitpid(self.pid, 0)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_in_a_real_shell(shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    # `yuan` completes, and otherwise writes down its words
    (tmp_path / "bin").mkdir()
    wrapper = tmp_path / "bin" / "yuan"
    wrapper.write_text(f'#!/bin/sh\n[ -z "$YUAN_COMPLETE" ] || {{ {BIN}/yuan "$@"; touch {tmp_path}/yuan_was_asked; exit; }}\nprintf "%s|" "$@" > {tmp_path}/yuan_part; mv {tmp_path}/yuan_part {tmp_path}/yuan_was_given\n')
    wrapper.chmod(0o755)
    (tmp_path / "corpus.jsonl").touch()
    terminal = Terminal(shell, tmp_path)
    terminal.type(f"export PATH={tmp_path}/bin:$PATH\n")
    try:
        assert terminal.completed("yuan pretr") == "pretrain|END|"
        assert terminal.completed("yuan pretrain recipe=345m_1") == "pretrain|recipe=345m_1dp|END|"
        assert terminal.completed("yuan pretrain rec") == "pretrain|recipe=END|"
        assert terminal.completed("yuan pretrain traini") == "pretrain|training.END|"
        assert terminal.completed("yuan pretrain training.seq") == "pretrain|training.seq_length=END|"
        assert terminal.completed("yuan pretrain launch.kind=to") == "pretrain|launch.kind=torchrun|END|"
        assert terminal.completed("yuan pretrain recipe=345m_1dp --dry") == "pretrain|recipe=345m_1dp|--dry-run|END|"
        assert terminal.completed("yuan preprocess --input corp") == "preprocess|--input|corpus.jsonl|END|"
    finally:
        terminal.close()


def test_did_you_mean_for_verbs_recipes_and_keys(tmp_path):
    assert "Did you mean 'generate', " in yuan("genrate", cwd=tmp_path).stderr
    assert "did you mean quickstart or quickstart_sft?" in yuan("check", "recipe=quikstart", cwd=tmp_path).stderr
    assert "did you mean optimizer.min_lr or " in yuan("check", "recipe=quickstart", "optimizer.mni_lr=1", cwd=tmp_path).stdout
