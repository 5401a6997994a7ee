"""The settings of a run: one frozen table each, every field with its meaning.

Only tables and their own checks stand here; `gptnorm.recipe` reads files and
command lines into them and decides which layer wins.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from gptnorm.errors import bad_value

STRICT = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)
"""Unknown keys and silent conversions ("3" for 3, true for 1) are errors."""

Positive = Annotated[int, Field(gt=0, lt=2**31)]
"""Bounded so that a slip of the keyboard is an error here and not an overflow in torch or numpy."""

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

BUILT_IN_CORPORA = ("sotu", "stdlib")
BUILT_IN_TOKENIZERS = ("bytes", "bpe")

NO_SLOTS = ("none",)
"""`gauge.slots` that stands for none."""

BackboneName = Literal["gpt2", "llama2", "llama3"]
WidthRuleName = Literal["none", "align", "mup"]
Precision = Literal["fp32", "bf16", "fp8"]
Scalar = bool | int | float | str


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """What is trained: a backbone of some size, normalised by a strategy."""

    strategy: str = ""
    """How the model is normalised; `gptnorm strategies` lists them. Has to be set."""
    backbone: BackboneName = "llama2"
    """gpt2 (learned positions, GELU, tied head), llama2 (RoPE, SwiGLU), llama3 (with grouped queries)."""
    preset: str | None = None
    """A published size of the backbone, such as 20M or 7B; keys set beside it win over it."""
    d_model: Positive = 64
    """Width d of the residual stream."""
    n_layers: Positive = 4
    """Number L of blocks."""
    n_heads: Positive = 4
    """Number h of attention heads; divides d_model."""
    n_kv_heads: Positive | None = None
    """Key/value heads (grouped queries); divides n_heads. Left out: as many as n_heads."""
    d_ff: Positive | None = None
    """Feed-forward width. Left out: the backbone's own rule."""
    ffn_multiple: Positive | None = None
    """The Llama rule rounds d_ff up to a multiple of this. Left out: 256 (llama2), 1024 (llama3)."""
    vocab_size: Positive | None = None
    """Rows of the embedding. Left out: the tokenizer's vocabulary."""
    tied: bool | None = None
    """Whether the head shares the embedding's weight. Left out: as the backbone was published."""
    dropout: Fraction = 0.0
    """Probability of dropping a feature of the embedding's output and of each branch's output while training."""

    def __post_init__(self) -> None:
        if self.d_model % self.n_heads:
            raise bad_value("model.n_heads", self.n_heads, f"must divide model.d_model = {self.d_model}")
        if self.n_kv_heads and self.n_heads % self.n_kv_heads:
            raise bad_value("model.n_kv_heads", self.n_kv_heads, f"must divide model.n_heads = {self.n_heads}")
        if self.backbone != "gpt2" and (self.d_model // self.n_heads) % 2:
            raise bad_value(
                "model.n_heads",
                self.n_heads,
                f"rotary positions need an even head width, and {self.d_model}/{self.n_heads} is odd",
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptionsConfig:
    """What composes with a strategy; a pair that makes no sense is refused with the reason."""

    qk_norm: Literal["none", "full", "head"] = "none"
    """Norm of queries and keys before the rotary positions: over all heads together, or per head."""
    v_norm: Literal["none", "full", "head"] = "none"
    """Norm of values: over all heads together, or per head."""
    attention_softcap: PositiveFloat | None = None
    """c in c tanh(logit / c) of the attention logits. Left out: none. It keeps attention from being fused."""
    logit_softcap: PositiveFloat | None = None
    """c in c tanh(logit / c) of the head's logits. Left out: none."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of the mean squared logsumexp of the head's logits in the training objective."""
    qk_clip: PositiveFloat | None = None
    """Largest attention logit: after a step, W_q and W_k of a head that went beyond it are shrunk. Left out: none."""
    scale_mode: Literal["published", "none", "init", "forward", "both"] = "published"
    """Where the depth factor stands (ScaleInit): in the initialisation as the backbone's authors have it, nowhere, in
    the initialisation of the output projections, as a constant factor of the branches in the forward pass, or both."""
    scale_target: Literal["both", "ffn", "attn"] = "both"
    """Which branches have the depth factor."""
    scale_count: Literal["2L", "L"] = "2L"
    """What the depth factor counts: sub-layers or blocks."""
    scale_power: Annotated[float, Field(gt=0, le=8)] = 0.5
    """p in the depth factor (2L)^-p or L^-p."""
    norm_scale: Literal["live", "frozen"] = "live"
    """Where the scale of the strategy's norms comes from: each token's own RMS (live), or one constant per norm,
    1/RMS over the first micro-batch at initialisation (frozen); with gains either way."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MoEConfig:
    """The mixture of experts in place of a dense feed-forward; only on the Llama backbones."""

    experts: Count = 0
    """Routed experts, each model.d_ff wide; 0: the feed-forward is dense."""
    top_k: Positive = 2
    """Routed experts of each token."""
    shared: Count = 0
    """Experts that every token passes through, each model.d_ff wide."""
    gate: Literal["softmax", "sigmoid"] = "softmax"
    """How router logits become weights, in fp32: over all experts, before the choice."""
    renormalize: bool = True
    """Whether the weights of a token's chosen experts are divided by their sum."""
    router_norm: bool = False
    """Whether the router's logits are normed: RMSNorm with a gain per expert, whatever the strategy's own norm is."""
    branch_gain: Literal["none", "sqrt_k", "auto"] | PositiveFloat = "none"
    """Factor gamma of the routed sum that keeps a branch's variance that of a dense one: none, sqrt(top_k), 1 / sqrt(E
    sum g^2) for the router as it was drawn ("auto"), or a number. Unless it is "none", the sum with the shared experts
    is divided by sqrt(1 + shared)."""
    balance: Literal["loss", "bias", "none"] = "loss"
    """How experts are kept equally busy: an auxiliary loss (Switch), or a bias on the choice alone, moved after each
    step against the load (DeepSeek-V3)."""
    balance_weight: NonNegativeFloat = 0.01
    """Weight of the balancing loss, which is 1 at an even load; mean over blocks and micro-batches."""
    bias_rate: Annotated[float, Field(gt=0, le=1e30)] = 1e-3
    """How far the bias moves in a step."""
    z_loss: NonNegativeFloat = 1e-3
    """Weight of the mean squared logsumexp of the router's logits."""

    def __post_init__(self) -> None:
        if self.experts and self.top_k > self.experts:
            raise bad_value("moe.top_k", self.top_k, f"at most moe.experts = {self.experts}")
        if self.experts and self.top_k == 1 and self.renormalize:
            reason = "one renormalised weight is always 1, so the router would learn nothing from the task"
            raise bad_value("moe.top_k", self.top_k, f"{reason}; set moe.renormalize=false, or more experts per token")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class InitConfig:
    """How weights are drawn before the first step."""

    std: PositiveFloat | Literal["published", "twin", "unit"] = "twin"
    """Standard deviation of the blocks' matrices: "published" (the backbone's own), "twin"
    (published x sqrt(2048 / d_model), its faithful copy at another width), a number that stands in
    for the published one, or "unit" (every map keeps the variance of random vectors: 1/sqrt(fan in),
    the feed-forward's activation made up for in W_down). Published depth factors are kept
    (options.scale_mode) in all but the last, which has none."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """Which text, and how it becomes tokens."""

    path: Text | tuple[Text, ...] = "sotu"
    """"sotu" (English speeches), "stdlib" (Python's own sources), a file, a folder, or a list of
    them (.txt, .md, .py, .jsonl, .jsonl.gz, .parquet), or a folder of ready shards
    (train.bin and val.bin, as 'gptnorm data build' or nanoGPT writes them)."""
    text_field: str = "text"
    """The field that holds the text in .jsonl and .parquet files and in datasets."""
    tokenizer: str = "bytes"
    """"bytes", "bpe" (byte-level BPE trained on this corpus), or a tokenizer.json."""
    bpe_vocab: Annotated[int, Field(ge=257, le=2**24)] = 4096
    """Vocabulary of a BPE trained here, its end-of-text token included."""
    end_of_text: str | None = None
    """The token put after each document. Left out: the tokenizer's usual one."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the documents held out for validation, chosen by the hash of their content."""
    val_tokens: Positive = 10_000_000
    """Most tokens that are held out: of a large corpus fewer documents are, those of the smallest hashes."""
    max_tokens: Annotated[int, Field(gt=0, lt=2**63)] | None = None
    """The corpus ends with the document that reaches so many tokens, both splits together. Left out: all of it."""
    max_documents: Annotated[int, Field(gt=0, lt=2**63)] | None = None
    """The corpus ends with this document, both splits together. Left out: all of it."""
    deduplicate: bool = False
    """Whether a text that occurred before is left out of the training split too; held-out texts never repeat."""
    cache: str | None = None
    """Where shards are kept. Left out: $GPTNORM_CACHE, else the user's cache folder."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """The loop."""

    steps: Positive = 400
    """Updates of the weights."""
    batch_size: Positive = 16
    """Sequences per update."""
    accumulate: Positive = 1
    """Forward/backward passes per update; divides batch_size."""
    seq_len: Positive = 96
    """Tokens per sequence."""
    precision: Precision = "fp32"
    """bf16: matrix products in bfloat16 (autocast) over fp32 weights. fp8: the same, with what the blocks' linear maps
    multiply rounded to float8, one scale for each tensor; simulated, so nothing is faster (docs/recipes.md)."""
    compile: bool = False
    """Whether torch.compile is used, block by block."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What backward computes again instead of keeping it: nothing, everything but the matrix products and attention,
    or all of a block."""
    device: str = "auto"
    """"auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N"."""
    threads: Annotated[int, Field(gt=0, le=4096)] | None = None
    """CPU threads of the process. Left out: torch's choice."""
    eval_every: Count = 0
    """Steps between validations; 0: only at the end."""
    eval_sequences: Positive = 512
    """Sequences of a validation, spread evenly over the held-out tokens; the same each time and for every batch."""
    log_every: Positive = 1
    """Steps between lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        if self.batch_size % self.accumulate:
            raise bad_value("train.accumulate", self.accumulate, f"must divide train.batch_size = {self.batch_size}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimConfig:
    """The optimizer and its schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: Muon for the matrices of the blocks, AdamW for all else, at one learning rate."""
    lr: Annotated[float, Field(ge=0, le=1e30)] = 4e-3
    """Peak learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay rates of Adam's two moments."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay, multiplied by the learning rate."""
    decay_on: Literal["all", "matrices"] = "all"
    """What decays: every tensor (SimpleGPT's code), or linear maps and tables alone (nanoGPT)."""
    momentum: Fraction = 0.95
    """Muon's."""
    clip: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0: no clipping."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up; wsd: constant, then linear over `wsd_decay`."""
    warmup: NonNegativeFloat = 0.1
    """Linear warm-up: a fraction of the steps if below 1, else a number of steps."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1
    """What the learning rate falls to, as a fraction of the peak, one update after the last; schedule="constant" has
    none, wsd is a constant with one."""
    wsd_decay: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Fraction of the steps over which wsd decays."""
    width_rule: WidthRuleName = "none"
    """How initial scale and learning rate follow the width, so that a rate tuned at `base_width` holds at another:
    "align" (Adam LR full align: hidden matrices and head by s = d_model / base_width) or "mup" (the initial scale of
    head and router falls with s instead of its root). Where the rate is divided by s the decay is multiplied by it."""
    base_width: Positive | None = None
    """The width at which `lr` was tuned. Has to be set where there is a `width_rule`."""

    def __post_init__(self) -> None:
        if self.width_rule != "none" and self.name == "muon":
            # Its updates are as large at any width: divided by s their effect would fall with it.
            raise bad_value(
                "optim.width_rule", self.width_rule, "is for AdamW; must be 'none' where optim.name = 'muon'"
            )
        if self.width_rule != "none" and self.base_width is None:
            raise bad_value("optim.base_width", None, f"must be set where optim.width_rule = {self.width_rule!r}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """What is kept of the weights."""

    every: Count = 0
    """Steps between checkpoints; 0: only at the end."""
    keep: Positive = 2
    """How many of the newest checkpoints are kept."""
    final: bool = True
    """Whether the last step is kept."""
    best: bool = False
    """Whether a checkpoint is written at each validation loss below all before it, and the newest of these kept."""
    asynchronous: bool = True
    """Whether a checkpoint is written while the run goes on, from a copy of its tensors in CPU memory."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GuardConfig:
    """Which updates are left out."""

    sigmas: PositiveFloat | None = None
    """Skip an update whose loss or gradient norm is this many standard deviations above the mean of those before it.
    Default: none is skipped. 6 is usual."""
    window: Annotated[int, Field(ge=16, le=65536)] = 128
    """How many updates that mean and deviation are taken over; the first ones are all made."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ParallelConfig:
    """How a run is spread over the processes that torchrun started."""

    data: Positive | None = None
    """Processes that share the sequences of a batch; weights, gradients and moments are sharded over them (FSDP2).
    Left out: as many as there are, divided by `tensor`."""
    tensor: Positive = 1
    """Processes that share each matrix product (tensor parallelism)."""
    reshard: bool = True
    """Whether a block's weights are let go after the forward pass and gathered again for the backward pass."""
    param_dtype: Literal["fp32", "bf16"] = "fp32"
    """What weights are gathered and used in; they are kept, and gradients reduced, in fp32 either way."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WatchConfig:
    """What is read of the norms while the run trains (watch.jsonl; docs/inspect.md)."""

    every: Count = 50
    """Steps between readings, beside the first step; 0: none. A reading costs about a forward pass over `sequences`."""
    sequences: Positive = 2
    """Sequences of the step's first micro-batch that are read."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GaugeConfig:
    """What is read of the loss's curvature while the run trains (metrics.jsonl; docs/curvature.md)."""

    every: Count = 0
    """Steps between readings, beside the first step; 0: none. A reading takes as long as some steps, which it says."""
    sequences: Positive = 2
    """Sequences of the step's first micro-batch that the Hessian is of; on several processes rounded up to a multiple
    of `parallel.data`."""
    slots: tuple[Text, ...] = ()
    """Modules in whose input the Hessian and its parts L and C are read, such as blocks.2.attn.q; a wrong name shows
    which there are, ["none"] is none. Left out: those of the middle block, on several processes none."""
    token: Count | None = None
    """The token of the first sequence at which slots are read. Left out: the middle one."""
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Residual, as a part of an eigenvalue, at which that is taken for found: as a rule it is far nearer."""
    most: Positive = 30
    """Hessian products for an eigenvalue, after which it is left as it is."""
    products: Literal["auto", "autograd", "differences"] = "auto"
    """How: by differentiating twice, by differences of gradients (for kernels without a second derivative; no slots),
    or the first on one process and the second on several."""

    def __post_init__(self) -> None:
        if self.slots not in ((), NO_SLOTS) and self.products == "differences":
            raise bad_value("gauge.slots", list(self.slots), 'must be left out with gauge.products = "differences"')


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig:
    """Where the run is written."""

    dir: Text | None = None
    """The run folder; must not hold a run yet. Left out: runs/<recipe>-<strategy>-<number>."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """Everything that decides a run."""

    model: ModelConfig = ModelConfig()
    strategy: dict[str, Scalar] = Field(default_factory=dict)
    """Options of the chosen strategy; `gptnorm strategies NAME` lists them."""
    options: OptionsConfig = OptionsConfig()
    moe: MoEConfig = MoEConfig()
    init: InitConfig = InitConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    parallel: ParallelConfig = ParallelConfig()
    watch: WatchConfig = WatchConfig()
    gauge: GaugeConfig = GaugeConfig()
    run: RunConfig = RunConfig()
    seed: Count = 0
    """Draws the weights and the order of the data."""

    def __post_init__(self) -> None:
        if self.moe.experts and self.model.backbone == "gpt2":
            raise bad_value("moe.experts", self.moe.experts, "must be 0 on gpt2; llama2 and llama3 take experts")
        if self.train.precision == "fp8" and self.parallel.tensor > 1:
            allowed = 'must be 1 with train.precision = "fp8": a part of a tensor has another scale than the whole'
            raise bad_value("parallel.tensor", self.parallel.tensor, allowed)
        if self.optim.warmup >= 1 and self.optim.warmup > self.train.steps:
            raise bad_value("optim.warmup", self.optim.warmup, f"at most train.steps = {self.train.steps}")
        warmup = self.optim.warmup / (self.train.steps if self.optim.warmup >= 1 else 1)
        if self.optim.schedule == "wsd" and warmup + self.optim.wsd_decay > 1 + 1e-9:
            allowed = f"must leave room for optim.warmup = {self.optim.warmup:g}; together at most all of the steps"
            raise bad_value("optim.wsd_decay", self.optim.wsd_decay, allowed)
        if self.gauge.token is not None and self.gauge.token >= self.train.seq_len:
            allowed = f"must be 0 … {self.train.seq_len - 1}, a position of the sequence"
            raise bad_value("gauge.token", self.gauge.token, allowed)
        if self.gauge.every and self.parallel.param_dtype == "bf16":
            allowed = 'must be 0 with parallel.param_dtype = "bf16": differences of gradients need weights in fp32'
            raise bad_value("gauge.every", self.gauge.every, allowed)
