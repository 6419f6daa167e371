"""The one schema of a recipe: groups of keys, each with its type, default and meaning.

A key bears the name, the values and the meaning of Megatron-LM's argument of that name; where a key is ours, its
text says so. `None` means "not given": it is then derived (the text says from what) or the feature is off.
The string under a field is its documentation: `yuan recipes keys` prints it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, List, Literal, Optional  # noqa: UP035  OmegaConf reads these at run time on Python 3.10


@dataclass
class Model:
    family: Literal["gpt2", "llama", "yuan2"] = "gpt2"
    """Which architecture, and so which names its tensors have in other formats. yuan2 has filtered attention (LFA)."""
    num_layers: Optional[int] = None
    """Transformer layers."""
    hidden_size: Optional[int] = None
    """Width of the residual stream."""
    ffn_hidden_size: Optional[int] = None
    """Width of the feed-forward layer. Derived: 4 x hidden_size, with swiglu int(8 x hidden_size / 3 / 64) x 64."""
    num_attention_heads: Optional[int] = None
    """Query heads."""
    num_query_groups: Optional[int] = None
    """Key/value heads (grouped-query attention). Derived: num_attention_heads."""
    kv_channels: Optional[int] = None
    """Width of one head. Derived: hidden_size / num_attention_heads."""
    max_position_embeddings: Optional[int] = None
    """Longest sequence the model can see. Derived: training.seq_length."""
    position_embedding_type: Literal["learned_absolute", "rope", "none"] = "learned_absolute"
    """How positions enter the model."""
    rotary_base: int = 10000
    """RoPE theta."""
    rotary_percent: float = 1.0
    """Share of a head's width that RoPE turns."""
    rotary_bf16: bool = False
    """Ours, yuan2: RoPE's angles rounded to bf16, as the released weights of Yuan 2.0 were trained. Else fp32, for all others."""
    use_rope_scaling: bool = False
    """Llama 3's scaling of RoPE to sequences beyond 8192: low frequencies are divided by rope_scaling_factor."""
    rope_scaling_factor: float = 8.0
    """By how much; Llama 3.1: 8, Llama 3.2: 32."""
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """Kind of norm."""
    norm_epsilon: float = 1e-5
    """Added to the variance in a norm."""
    swiglu: bool = False
    """Gated SiLU in the feed-forward layer instead of GELU."""
    openai_gelu: bool = False
    """GELU by the tanh formula, as OpenAI's GPT-2 was trained and as Megatron-LM's kernel that adds the bias has it, instead of the exact one."""
    add_bias_linear: bool = True
    """Biases in the linear layers (Megatron-LM: --disable-bias-linear turns them off)."""
    add_qkv_bias: bool = False
    """Biases in the query/key/value projection alone, when add_bias_linear is off."""
    untie_embeddings_and_output_weights: bool = False
    """An output layer of its own instead of the transposed embedding."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights; output projections use std / sqrt(2 x num_layers)."""
    attention_dropout: float = 0.1
    """Dropout on attention probabilities."""
    hidden_dropout: float = 0.1
    """Dropout on the residual branches and the embedding."""
    attention_backend: Literal["auto", "flash", "fused", "unfused"] = "auto"
    """What computes the attention. flash, fused: one kernel that keeps no s x s matrix (Transformer Engine's, else torch's). unfused: matrix products and a softmax. auto: Transformer Engine's choice, else fused."""
    attention_softmax_in_fp32: bool = False
    """Attention's softmax in fp32 under fp16 or bf16."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this x tensor_model_parallel_size."""
    quantize: Optional[Literal["int8"]] = None
    """Ours: the layers' matrices in int8, a scale for each output, for answers alone; `yuan convert --quantize` makes them."""


@dataclass
class Parallel:
    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's matrices."""
    pipeline_model_parallel_size: int = 1
    """Stages of consecutive layers."""
    pipeline_model_parallel_layout: Optional[str] = None
    """Explicit stages in Megatron's notation, such as 'Et*3|t*3L': E embedding, t layer, L loss, | between stages."""
    num_layers_per_virtual_pipeline_stage: Optional[int] = None
    """Layers per virtual stage: the interleaved pipeline schedule."""
    decoder_first_pipeline_num_layers: Optional[int] = None
    """Layers on the first stage, when stages are uneven."""
    decoder_last_pipeline_num_layers: Optional[int] = None
    """Layers on the last stage, when stages are uneven."""
    sequence_parallel: bool = False
    """Split norms and dropout over the sequence among the tensor-parallel ranks."""
    use_distributed_optimizer: bool = False
    """Share the optimizer's state among the data-parallel ranks (ZeRO-1)."""
    zero: Optional[int] = None
    """Ours: ZeRO's stage. 1: the distributed optimizer. 2: torch's FSDP2 shares out the gradients too, 3: and the weights."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the forward pass runs (needs the distributed optimizer)."""
    recompute_granularity: Optional[Literal["full", "selective"]] = None
    """Recompute activations in the backward pass: whole layers, or the attention alone."""
    recompute_method: Optional[Literal["uniform", "block"]] = None
    """Which layers, with full: chunks of recompute_num_layers, or the first recompute_num_layers of a stage."""
    recompute_num_layers: Optional[int] = None
    """Layers per chunk (uniform) or recomputed layers per stage (block)."""
    cpu_offloading_num_layers: int = 0
    """Layers whose activations wait for the backward pass in the host's memory; on GPUs with Transformer Engine."""
    distributed_timeout_minutes: int = 10
    """How long a collective may wait before the run is declared dead."""


@dataclass
class Training:
    seq_length: Optional[int] = None
    """Tokens per sample."""
    micro_batch_size: Optional[int] = None
    """Samples per forward pass on one data-parallel rank."""
    global_batch_size: Optional[int] = None
    """Samples per step over the whole run. Derived: micro_batch_size x data-parallel size."""
    rampup_batch_size: Optional[List[int]] = None
    """[start, increment, samples]: grow the global batch from start by increment until samples were seen."""
    train_iters: Optional[int] = None
    """Steps to train. Give one of train_iters, train_samples, train_tokens."""
    train_samples: Optional[int] = None
    """Samples to train."""
    train_tokens: Optional[int] = None
    """Ours: tokens to train; rounded down to whole samples of seq_length."""
    epochs: Optional[int] = None
    """Ours, fine-tuning: how often every row of data.train is seen, instead of one of the above."""
    loss_normalization: Literal["token", "sample"] = "token"
    """Ours, fine-tuning: every supervised token of the global batch counts the same, or every row does."""
    early_stop_patience: Optional[int] = None
    """Ours, fine-tuning: end after so many evaluations in a row without a lower validation loss."""
    seed: int = 1234
    """Seed of the initial weights, the data order and dropout."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Ours: Megatron-LM's --bf16, --fp16 or neither."""
    loss_scale: Optional[float] = None
    """fp16: a fixed loss scale. Not given: a dynamic one."""
    initial_loss_scale: float = 4294967296.0
    """fp16: the dynamic loss scale's first value."""
    min_loss_scale: float = 1.0
    """fp16: the dynamic loss scale's floor."""
    loss_scale_window: int = 1000
    """fp16: steps without overflow before the scale grows."""
    hysteresis: int = 2
    """fp16: overflows before the scale shrinks."""
    eval_interval: int = 1000
    """Steps between evaluations on the validation set."""
    eval_iters: int = 100
    """Batches per evaluation; 0 turns it off."""
    exit_duration_in_mins: Optional[float] = None
    """Save and stop after this many minutes."""
    exit_interval: Optional[int] = None
    """Save and stop at a step divisible by this."""
    torch_compile: bool = False
    """Ours: torch.compile on a layer's norms, SwiGLU and residual sums: some ten seconds at the start, a few percent of a step. On a CPU it needs g++."""


@dataclass
class Optimizer:
    optimizer: Literal["adam"] = "adam"
    """adam is AdamW: decoupled weight decay."""
    lr: Optional[float] = None
    """Peak learning rate."""
    min_lr: float = 0.0
    """Floor of the learning rate after decay."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    """Shape of the decay."""
    lr_decay_iters: Optional[int] = None
    """Steps over which the learning rate decays. Derived: the length of the training."""
    lr_decay_samples: Optional[int] = None
    """The same in samples."""
    lr_decay_tokens: Optional[int] = None
    """Ours: the same in tokens."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up."""
    lr_warmup_samples: int = 0
    """The same in samples."""
    lr_warmup_tokens: int = 0
    """Ours: the same in tokens."""
    lr_warmup_fraction: Optional[float] = None
    """Warm-up as a share of the decay length."""
    lr_warmup_init: float = 0.0
    """Learning rate at the start of the warm-up."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """WSD: shape of the last phase."""
    lr_wsd_decay_iters: Optional[int] = None
    """WSD: steps of the last phase."""
    lr_wsd_decay_samples: Optional[int] = None
    """The same in samples."""
    lr_wsd_decay_tokens: Optional[int] = None
    """Ours: the same in tokens."""
    weight_decay: float = 0.01
    """Decoupled weight decay; biases and norms are left out of it."""
    start_weight_decay: Optional[float] = None
    """First weight decay, when it grows."""
    end_weight_decay: Optional[float] = None
    """Last weight decay, when it grows."""
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """How the weight decay grows."""
    clip_grad: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to Adam's denominator."""
    optimizer_cpu_offload: bool = False
    """Keep and update the optimizer's state in the host's memory; on GPUs, with the distributed optimizer."""
    optimizer_offload_fraction: float = 1.0
    """The share of it that is kept there."""
    overlap_cpu_optimizer_d2h_h2d: bool = False
    """Copy gradients and weights while the host updates others."""


@dataclass
class Lora:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685), trained instead of the weights. All of it is ours."""

    rank: Optional[int] = None
    """r: beside each adapted matrix W, which stays as it is, alpha / r x B A is trained, A [r, in] and B [out, r]. Not given: all weights are trained."""
    alpha: Optional[float] = None
    """Weighs what the adapters add. Derived: 2 x rank."""
    dropout: float = 0.0
    """Dropout on what goes into A."""
    target_modules: Optional[List[str]] = None
    """The adapted matrices of each layer, by megatron-core's names: linear_qkv (yuan2: linear_qk, linear_v), linear_proj, linear_fc1, linear_fc2. Derived: all."""


@dataclass
class Data:
    data_path: Any = None
    """Prefix of a .bin/.idx pair, or a blend: [0.7, a_text_document, 0.3, b_text_document]."""
    split: Optional[str] = None
    """Shares of train, validation and test, such as '969,30,1' (the default with data_path)."""
    train_data_path: Any = None
    """Training data, prefix or blend, where the three sets are files of their own."""
    valid_data_path: Any = None
    """Validation data of the same kind."""
    test_data_path: Any = None
    """Test data of the same kind."""
    train: Any = None
    """Ours, fine-tuning: files of questions and answers (JSON array or JSONL), one or a list."""
    valid: Any = None
    """Ours, fine-tuning: the same to evaluate on."""
    packing: bool = True
    """Ours, fine-tuning: several rows in one sample, each by itself: attention and positions begin anew."""
    mask_history: bool = False
    """Ours, fine-tuning: of a conversation the last answer alone is trained, not every one."""
    reset_position_ids: bool = False
    """Positions start again after every end of document: learned ones, and with yuan2 those of RoPE, which Megatron leaves alone."""
    reset_attention_mask: bool = False
    """Attention stays within a document, and so does yuan2's filter."""
    eod_mask_loss: bool = False
    """No loss on end-of-document tokens."""
    num_workers: Optional[int] = None
    """Data loader processes per rank. Derived: 2 on a GPU, 0 on a CPU: a forked loader would keep a second copy of the weights alive."""
    data_cache_path: Optional[str] = None
    """Folder of the sample indices. Derived: a folder `cache` beside the data."""


@dataclass
class Tokenizer:
    type: Literal[
        "GPT2BPETokenizer", "HuggingFaceTokenizer", "TikTokenizer", "SentencePieceTokenizer", "YuanTokenizer", "NullTokenizer"
    ] = "GPT2BPETokenizer"  # fmt: skip
    """Megatron-LM's --tokenizer-type; YuanTokenizer is that of Yuan 2.0's fork."""
    tokenizer_model: Optional[str] = None
    """SentencePiece's .model, Hugging Face's tokenizer.json, or a .tiktoken; for the first two, and Yuan's, a folder with it too."""
    vocab_file: Optional[str] = None
    """GPT-2's vocab.json."""
    merge_file: Optional[str] = None
    """GPT-2's merges.txt."""
    vocab_size: Optional[int] = None
    """Ids in the data, with NullTokenizer (the end of document is one more); else derived from the files, or room for more."""
    eod_token: Optional[str] = None
    """Ours: the token that ends a document, with HuggingFaceTokenizer (else its eos_token) or TikTokenizer (else <|endoftext|>)."""
    tokenizer_hf_include_special_tokens: bool = False
    """HuggingFaceTokenizer: put the beginning of sentence before every text that its tokenizer.json asks for. Off in 0.16, too."""
    tiktoken_pattern: Optional[str] = None
    """TikTokenizer: how texts are split: r50k_base, p50k_base, cl100k_base, o200k_base, v1, v2 or a regular expression. Derived: the file's name."""
    tiktoken_special_tokens: Any = None
    """TikTokenizer: a list of names, or names with their ids. Not given: those of the published encoding."""
    tiktoken_num_special_tokens: Optional[int] = None
    """TikTokenizer: ids before the ranks of a .json vocabulary; 1000 as in Megatron-LM if not given."""
    chat_template: Optional[Literal["alpaca", "yuan", "llama2", "chatml", "plain", "tokenizer"]] = None
    """Ours: how questions and answers are written, in fine-tuning, generation and serving; tokenizer: its own (Jinja)."""
    plain_special_tokens: bool = False
    """Ours: read a literal '<|endoftext|>' in the text as ordinary characters, as Megatron-LM's older versions did."""
    use_gigatoken: Optional[bool] = None
    """Encode large texts by gigatoken, which is checked to give the same ids. Not given: where it does."""


@dataclass
class Preprocess:
    input: Any = None
    """Text to tokenize: a file, a folder, a pattern, or a list of these; plain, .gz, .zst, .bz2 or .xz."""
    format: Optional[Literal["jsonl", "json", "text", "yuan", "parquet"]] = None
    """Ours: JSON objects on lines, a JSON array, documents on lines (yuan: with <n> and [SEP]), Parquet. Told by the names."""
    max_bad: int = 0
    """Ours: lines that may be left out because they cannot be read; they are counted and the first are shown."""
    shard: Optional[str] = None
    """Ours: 'i/n', the i-th of n shares of the input, from 0, for several machines; `yuan data merge` joins them."""
    output_prefix: Optional[str] = None
    """The output is <output_prefix>_<key>_document.bin and .idx."""
    json_keys: List[str] = field(default_factory=lambda: ["text"])
    """Keys of each line's object to tokenize, one output each."""
    append_eod: bool = False
    """End every document with the end-of-document token."""
    workers: Optional[int] = None
    """Processes. Derived: the machine's cores."""


@dataclass
class Checkpoint:
    save_interval: Optional[int] = None
    """Steps between checkpoints; the last step is always saved."""
    format: Literal["torch_dist", "torch"] = "torch_dist"
    """torch_dist: resumes at any TP/PP/DP. torch: Megatron-LM's mp_rank_XX/model_optim_rng.pt, for the same layout."""
    load: Optional[str] = None
    """Start from this run or checkpoint instead of from random weights: a Hugging Face folder, or any format that `yuan convert` reads."""
    finetune: bool = False
    """With load: take the weights alone and start at step 0."""
    no_load_optim: bool = False
    """With load: leave the optimizer's state."""
    no_load_rng: bool = False
    """With load: leave the random number generators' state."""
    keep_best: bool = False
    """Ours, fine-tuning: save where the validation loss is the lowest so far, and keep that checkpoint."""
    keep_last: Optional[int] = None
    """Ours: how many checkpoints to keep; the newest whole one is never removed. Not given: all."""
    export_hf: Optional[str] = None
    """Ours: a folder to write when the training is over: its best checkpoint (with keep_best), else its last, for Hugging Face."""


@dataclass
class Logging:
    log_interval: int = 100
    """Steps between lines of metrics; losses are averaged over them."""
    tensorboard: bool = True
    """Ours: write TensorBoard scalars into the run folder."""


@dataclass
class Launch:
    kind: Literal["torchrun", "slurm"] = "torchrun"
    """Ours: torchrun starts the processes of this machine; slurm writes a batch script and submits it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Ours: auto is cuda where an NVIDIA GPU is present."""
    nproc_per_node: int = 1
    """Processes per machine, one per GPU; they are shared out over TP, PP and DP."""
    nnodes: int = 1
    """Machines."""
    node_rank: int = 0
    """This machine's number, with nnodes > 1."""
    rdzv_endpoint: Optional[str] = None
    """host:port of the first machine, with nnodes > 1."""
    max_restarts: int = 0
    """How often a dead run is started again from its last whole checkpoint."""
    cpu_threads: Optional[int] = None
    """Ours: threads per process. Derived on a CPU: cores / nproc_per_node."""
    gpu_memory_gib: Optional[float] = None
    """Ours: memory of one GPU in GiB, which `yuan check` and `yuan plan` hold the estimate against."""
    gpu_peak_tflops: Optional[float] = None
    """Ours: a GPU's dense peak in training.precision (A100 bf16: 312, H100 bf16: 989), for the estimate of days."""
    mfu: float = 0.4
    """Ours: the share of that peak which the estimate of days assumes."""


@dataclass
class Slurm:
    """With launch.kind=slurm. All of it is ours; what sbatch calls --nodes and --ntasks follows from `launch`."""

    account: Optional[str] = None
    """sbatch --account."""
    partition: Optional[str] = None
    """sbatch --partition."""
    qos: Optional[str] = None
    """sbatch --qos."""
    time: Optional[str] = None
    """sbatch --time, such as '2-00:00:00'."""
    signal_seconds: int = 300
    """Seconds before the time limit at which the run is told to save and end (sbatch --signal)."""
    requeue: bool = True
    """Queue the job again when it was stopped by the time limit or a preemption; it goes on from its checkpoint."""
    container_image: Optional[str] = None
    """Image for srun --container-image (pyxis/enroot)."""
    container_mounts: List[str] = field(default_factory=list)
    """HOST:CONTAINER paths for srun --container-mounts; the working folder is mounted in any case."""
    environment: List[str] = field(default_factory=list)
    """Names of environment variables handed on to the job. Their values are never written into the script."""
    setup: List[str] = field(default_factory=list)
    """Shell lines that every machine runs first, such as 'module load cuda' or 'source .venv/bin/activate'."""
    sbatch_args: List[str] = field(default_factory=list)
    """Further #SBATCH options, such as '--exclusive'."""


@dataclass
class Run:
    name: Optional[str] = None
    """Name of the run. Derived: the recipe's name."""
    dir: Optional[str] = None
    """The run's folder. Derived: runs/<name>."""


@dataclass
class Generate:
    load: Optional[str] = None
    """Run or checkpoint of any format, as checkpoint.load. Derived: the newest checkpoint under runs/."""
    input: Optional[str] = None
    """JSONL with `query` (or `prompt`, `text`, or `instruction` and `input`) on each line."""
    output: str = "output.txt"
    """One answer per input line; a name ending in .jsonl gets whole records."""
    max_new_tokens: int = 64
    """Longest answer in tokens."""
    batch_size: int = 8
    """Prompts answered side by side."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0 is off, 1 is greedy."""
    top_p: float = 0.0
    """Sample among the likeliest tokens whose probabilities add up to p; 0 is off."""
    greedy: bool = False
    """Always the likeliest token. So it is too where none of greedy, temperature, top_k and top_p is given."""
    repetition_penalty: float = 1.0
    """Divides the positive and multiplies the negative logits of tokens already seen; 1 is off."""
    seed: int = 1234
    """Seed of the sampling."""


@dataclass
class Convert:
    source: Optional[str] = None
    """The checkpoint to convert: a folder of any known format and layout."""
    target: Optional[str] = None
    """The folder to write."""
    to: Literal["torch_dist", "torch", "yuan", "pai", "hf", "mindspore"] = "torch_dist"
    """The format to write."""
    tensor_model_parallel_size: int = 1
    """Tensor-parallel ranks of what is written, in formats that have ranks."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages of what is written."""
    pipeline_model_parallel_layout: Optional[str] = None
    """Explicit stages of what is written, in Megatron's notation."""
    num_layers_per_virtual_pipeline_stage: Optional[int] = None
    """torch: layers per virtual stage of what is written, several of which each pipeline rank has."""
    optimizer: Literal["none", "keep", "plain", "distributed"] = "none"
    """Whether the training goes along, for a run to go on at another layout or format (torch_dist, torch): keep, with the optimizer's state in the form that it has; plain, or distributed over data-parallel ranks. none: weights alone."""
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """torch: whose modules the names are of: megatron-core's own, or Transformer Engine's, in which norms are part of the next layer."""
    pai_release: Literal["v0.5", "v0.6"] = "v0.6"
    """pai: v0.6 and later, or v0.5, with gate and up apart and RoPE's frequencies with every layer."""
    dtype: Optional[Literal["bf16", "fp16", "fp32"]] = None
    """Precision of what is written. Derived: that of the source."""
    quantize: Optional[Literal["int8"]] = None
    """int8: the layers' matrices as whole numbers, a scale for each output, for answers alone; torch_dist and mindspore."""
    hf_config: Optional[str] = None
    """A Hugging Face folder with config and tokenizer, for sources that carry none."""
    vocab_size: Optional[int] = None
    """Ids of the vocabulary, for sources that say only what it was padded to."""
    allow_nan: bool = False
    """Convert weights that hold NaN or infinity as they are."""
    workers: int = 1
    """Processes, each of which writes other tensors."""
    shard: Optional[str] = None
    """'i/n': write the i-th of n shares of the tensors, from 0, for several machines; the last to finish ends the conversion."""
    fused_layout: Optional[Literal["separate", "concat", "grouped"]] = None
    """MindSpore: query, key and value separate, or how they lie in one matrix; gate and up likewise."""
    source_fused_layout: Optional[Literal["concat", "grouped"]] = None
    """MindSpore: how they lie in the source, where no conversion.json beside it says it. Derived: fused_layout."""


@dataclass
class Serve:
    """The model, its layout and the defaults of sampling are those of `generate`, `parallel` and `launch`."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every one of this machine's."""
    port: int = 8000
    """Port to listen on."""


@dataclass
class Derived:
    """What follows from the rest. Filled by `resolve`, shown by `yuan recipes show`, never given by a user."""

    device: Optional[str] = None
    """cpu or cuda."""
    world_size: Optional[int] = None
    """launch.nnodes x launch.nproc_per_node."""
    data_parallel_size: Optional[int] = None
    """world_size / (TP x PP)."""
    num_microbatches: Optional[int] = None
    """global_batch_size / (micro_batch_size x data_parallel_size)."""
    vocab_size: Optional[int] = None
    """Ids of the tokenizer. None where its files are missing."""
    padded_vocab_size: Optional[int] = None
    """vocab_size padded to make_vocab_size_divisible_by x TP."""
    train_samples: Optional[int] = None
    """Samples that the steps of the whole training consume."""
    train_rows: Optional[List[str]] = None
    """Fine-tuning: prefixes of the prepared rows of data.train."""
    valid_rows: Optional[List[str]] = None
    """Fine-tuning: those of data.valid."""
    rows_sha256: Optional[str] = None
    """Fine-tuning: of the rows of data.train, their tokenizer and their template."""
    train_iters: Optional[int] = None
    """Steps of the whole training; of train_samples, what does not fill a last step is left out, as Megatron-LM does."""


@dataclass
class Recipe:
    """A whole recipe. One of these, resolved and frozen as YAML, is all that a worker process reads."""

    model: Model = field(default_factory=Model)
    parallel: Parallel = field(default_factory=Parallel)
    training: Training = field(default_factory=Training)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lora: Lora = field(default_factory=Lora)
    data: Data = field(default_factory=Data)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    preprocess: Preprocess = field(default_factory=Preprocess)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    logging: Logging = field(default_factory=Logging)
    launch: Launch = field(default_factory=Launch)
    slurm: Slurm = field(default_factory=Slurm)
    run: Run = field(default_factory=Run)
    generate: Generate = field(default_factory=Generate)
    convert: Convert = field(default_factory=Convert)
    serve: Serve = field(default_factory=Serve)
    derived: Derived = field(default_factory=Derived)
