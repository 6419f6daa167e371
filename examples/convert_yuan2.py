"""Yuan 2.0 102B or 51B, scaled down: from the released pipeline stages to the tensor ranks that answer, in one step.

    python examples/convert_yuan2.py [102b|51b]

First a small model of random weights with the released number of layers and stages is made, in Yuan 2.0's own files. What
follows are the commands for the real ones, with smaller sizes behind them: leave out what stands behind the recipe's name.
All is written below yuan2_102b_small or yuan2_51b_small, which may be removed afterwards.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from checkpoints.files.safetensors import Planned
from checkpoints.files.stored import raw
from checkpoints.models import yuan2

STORIES = {  # layers, pipeline stages as released, tensor ranks for answers, the released layout
    "102b": (84, 32, 8, "Ett|(tt|)*9(ttt|)*20tt|ttL"),
    "51b": (42, 16, 4, "Ett|(tt|)*4(ttt|)*10ttL"),
}
HIDDEN, FFN, HEADS, IDS = 64, 256, 8, 1680  # 1,680 ids: with their padding 8 x 211


def main(size: str) -> None:
    layers, stages, ranks, layout = STORIES[size]
    folder = Path(f"yuan2_{size}_small")
    random, released, answering, ours = (folder / name for name in ("random", "released", f"{ranks}tp", "torch_dist"))
    small = [
        f"model.hidden_size={HIDDEN}", f"model.ffn_hidden_size={FFN}", f"model.num_attention_heads={HEADS}", "model.max_position_embeddings=256",
        "tokenizer.type=NullTokenizer", f"tokenizer.vocab_size={IDS - 1}", "tokenizer.tokenizer_model=null",
    ]  # fmt: skip
    say(f"0 A model of {layers} layers in the files of {stages} pipeline stages, as the {size.upper()} is released")
    make(random, layers)
    yuan("convert", random, released, "--to", "yuan", "--pp", stages, "--layout", layout)
    yuan("inspect", released)
    say(f"1 To {ranks} tensor ranks, which Yuan 2.0's own server loads: nothing in between, one tensor in memory")
    yuan("convert", f"recipe=convert_yuan2_{size}_{ranks}tp", *small, f"convert.source={released}", f"convert.target={answering}")
    say("2 The two hold the same")
    yuan("convert", released, answering, "--verify")
    say("3 To torch_dist, which trains and answers at any layout, here at TP 2")
    yuan("convert", f"recipe=convert_yuan2_{size}", *small, f"convert.source={released}", f"convert.target={ours}")
    questions = folder / "questions.jsonl"
    questions.write_text(json.dumps({"query": "5 8 13 21 34"}) + "\n", encoding="utf-8")  # ids: the model has no tokenizer
    yuan("generate", "--load", ours, "--input", questions, "--output", folder / "answers.txt", "--max-new-tokens", 8,
         "parallel.tensor_model_parallel_size=2", "launch.device=cpu")  # fmt: skip


def make(folder: Path, layers: int) -> None:
    """Random weights as Hugging Face has Yuan 2.0."""
    config = {
        "model_type": "yuan", "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "vocab_size": IDS, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    table = yuan2.foreign(yuan2.from_config(config, "config.json"))
    shapes = {name: shape for one in table for name, shape in one.shapes().items()}
    with open(folder / "model.safetensors", "wb") as file:
        file.write(Planned([(name, torch.bfloat16, shape) for name, shape in shapes.items()]).header)
        for name, shape in shapes.items():
            file.write(raw(torch.ones(shape).bfloat16() if "norm" in name else torch.randn(shape).mul_(0.02).bfloat16()))


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def yuan(*words: object) -> None:
    """Print and run one command; the first that fails ends the story."""
    line = ["yuan", *map(str, words)]
    print(f"$ {shlex.join(line)}", flush=True)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    if code := subprocess.run(line, env=environment).returncode:
        sys.exit(code)


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["102b"], ["51b"]):
        sys.exit(__doc__)
    main(*(sys.argv[1:] or ["102b"]))
