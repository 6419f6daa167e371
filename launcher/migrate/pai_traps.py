"""What Pai-Megatron-Patch's scripts do that their users hardly mean, and what yuan does instead.

Each text says how to have the old behaviour again where there is a way. They hold for the releases from 0.5 on.
"""

PADDING_TOKEN = (
    "version 0.5 adds a padding token with id 32000, for which an embedding of 32000 rows has none: a look-up out of range. "
    "yuan masks padding and needs no token for it"
)
DROPOUT = (
    "not given, and so Megatron's 0.1: Llama was trained without, and a trained model's loss starts higher for it. "
    "As before: model.attention_dropout=0.1 model.hidden_dropout=0.1"
)
NAMES_OF_FILES = (
    "with false the script writes model_optim_rng.pt, which its own generation cannot open; yuan's checkpoints are the same "
    "either way"
)
ALWAYS_ANEW = (
    "the script always has --no-load-optim --no-load-rng: to go on with a run it starts Adam and the schedule anew. The same "
    "command of yuan goes on with all of it. Files of the script's own format (release/mp_rank_00) want `yuan convert` first"
)
SAME_FOLDER = (
    "the script's folders bear no date: a second run overwrites the first's checkpoints. yuan goes on with a run, or refuses"
)
BASH_ARITHMETIC = (
    "the script's arithmetic takes plain digits alone: it printed an error and started torchrun without --train-iters"
)
COPY_BY_HAND = (
    "the script wants model_rng.pt in release/, to be copied over by hand; yuan takes a run folder or any of its checkpoints"
)
REPEATED_TOKENS = (
    "the script divides negative logits too, which makes repeated tokens likelier; yuan multiplies them, as Hugging Face does"
)
FLASH_FALSE = "the script takes any word for true: `false` turned flash attention on"
LOSS_OF_PADDING = (
    "the script gives padding a loss, ends no answer and ignores `input`; yuan's loss is of the answer and its end alone"
)
NEVER_EVALUATES = "the script reads it and never evaluates"
SAVES_NOTHING = (
    "the script saves every 500 steps and not at the end: a short run leaves nothing. yuan always saves the last step"
)
SEQ_LEN_OF_PROMPTS = (
    "a prompt is cut to its first {seq} characters, and one whose tokens and answer exceed {seq} ends the whole job; yuan counts "
    "tokens, and gives one error in that line's place"
)
FOUR_PROCESSES = "version 0.5 starts 4 processes whatever TP is: with TP {tp} several answer everything and write the same file"
NEW_CONFIGURATION = "the script makes the configuration anew: RMSNorm with 1e-6 for Llama-2's 1e-5"
HEADS_OF_70B = ", and 64 key/value heads for 70B's 8"
PAD_LEN = "samples really had {real} tokens, not SEQ_LEN's {seq}{counted}. As before: training.seq_length={real}"
PAD_LEN_OF_ANSWERS = "; the template alone takes some 40, and a sample whose answer falls off gives NaN"
WARMUP = (
    "less than one step of {step} tokens: the script rounded the warm-up down to none. Here it is one step. "
    "As before: optimizer.lr_warmup_tokens=0"
)
