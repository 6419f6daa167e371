"""`yuan --install-completion`: what each shell is told, and where."""

from __future__ import annotations

from pathlib import Path

from launcher.completion import SHELL_ENV
from launcher.errors import UserError

BASH = f"""\
_yuan_complete() {{
    local IFS=$'\\n'
    COMPREPLY=($(COMP_WORDBREAKS="$COMP_WORDBREAKS" {SHELL_ENV}=bash "$1" "${{COMP_LINE:0:COMP_POINT}}" 2>/dev/null))
    [ ${{#COMPREPLY[@]}} -eq 0 ] || compopt -o nospace
}}
complete -o default -F _yuan_complete yuan
"""
ZSH = f"""\
(( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit; }}
_yuan_complete() {{
    local -a found
    found=("${{(@f)$({SHELL_ENV}=zsh "${{words[1]}}" "${{(j: :)words[1,CURRENT-1]}} $PREFIX" 2>/dev/null)}}")
    found=(${{found:#}})
    if (( $#found == 0 )); then
        [[ $PREFIX == *=* ]] && compset -P '*='
        _files
        return
    fi
    compadd -S '' -- ${{(M)found:#*[=.]}}
    compadd -- ${{found:#*[=.]}}
}}
compdef _yuan_complete yuan
"""
FISH = f"""\
complete --command yuan --arguments '({SHELL_ENV}=fish yuan (commandline --current-process --cut-at-cursor | string collect) 2>/dev/null)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def script(shell: str | None = None) -> str:
    """The shell's lines.

    Raises:
        UserError: it is none that is known.
    """
    shell = shell or _this_shell()
    if shell not in SCRIPTS:
        raise UserError(f"there is no completion for {shell}", "--install-completion", f"run it in {', '.join(SCRIPTS)}")
    return SCRIPTS[shell]


def install() -> str:
    """Put the script where this shell reads it when it starts; says where. A second time changes nothing."""
    shell, home = _this_shell(), Path.home()
    text = script(shell)
    if shell == "fish":
        path = home / ".config" / "fish" / "completions" / "yuan.fish"
    else:
        path = home / ".config" / "yuan" / f"completion.{shell}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    if shell != "fish":
        start, line = home / f".{shell}rc", f"source {path}"
        lines = start.read_text(encoding="utf-8").splitlines() if start.is_file() else []
        if line not in lines:
            with start.open("a", encoding="utf-8") as file:
                file.write(f"\n# completion of yuan\n{line}\n")
    return f"completion for {shell}: {path}; it works in the next shell that you start"


def _this_shell() -> str:
    import shellingham

    try:
        return shellingham.detect_shell()[0]
    except shellingham.ShellDetectionFailure:
        return "this shell"
