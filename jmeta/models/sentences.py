"""Sentence encoders of the BERT family, from a folder of sentence-transformers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from jmeta.core import Model, Params
from jmeta.errors import CheckpointError, ConfigError, DataError, ModelError
from jmeta.models.adapters import linen
from jmeta.models.attention import attend
from jmeta.models.norms import check_dtype
from jmeta.models.weights import load_params, pretrained
from jmeta.tree import widened

_ACTIVATIONS = {"gelu": lambda x: jax.nn.gelu(x, approximate=False), "relu": jax.nn.relu}
_STEP = 16  # widths of batches are multiples of it, so that few programs are compiled


class Bert(nn.Module):
    """A transformer that reads token ids and pools its tokens to the embedding of a sentence.

    Its parts are named as in the code of transformers, so that `jmeta.load_params` reads its files.

    Args:
        outputs: width of the last layer, called `head`; None leaves it away and gives the embedding.
        vocabulary: number of token ids.
        width: of the tokens and of the embedding.
        depth: number of blocks.
        heads: of the attention.
        hidden: width of the perceptron of each block.
        length: most tokens of a text.
        types: kinds of texts that the tokens may be of; all are of the first.
        activation: of the perceptrons, `"gelu"` or `"relu"`.
        epsilon: ε of the layer norms.
        pooling: `"mean"` of the tokens, or that of the first one, `"cls"`.
        unit: whether embeddings are scaled to length 1.
        padding: the id that is no token.
        dtype: of the computation, `"bfloat16"` or another float of 16 bits or more; None is that of the parameters.
            Parameters and outputs are float32 whatever it is.

    Raises:
        ConfigError: an unknown `dtype`.
        ModelError: inputs that are no token ids, or more of them than `length`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jmeta.models.sentences import Bert
        >>> ids = jnp.asarray([[2, 7, 3, 0], [2, 5, 6, 3]])
        >>> network = Bert(vocabulary=9, width=8, depth=1, heads=2, hidden=16)
        >>> network.init_with_output(jax.random.key(0), ids)[0].shape
        (2, 8)

    Reference: Devlin et al. 2019, "BERT"; Reimers, Gurevych 2019, "Sentence-BERT", https://arxiv.org/abs/1908.10084.

    Differences from the original: no dropout.
    """

    outputs: int | None = None
    vocabulary: int = 30522
    width: int = 384
    depth: int = 6
    heads: int = 12
    hidden: int = 1536
    length: int = 512
    types: int = 2
    activation: str = "gelu"
    epsilon: float = 1e-12
    pooling: Literal["mean", "cls"] = "mean"
    unit: bool = True
    padding: int = 0
    dtype: DTypeLike | None = None

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        super().__post_init__()

    @nn.compact
    def __call__(self, ids: Num[Array, "n tokens"]) -> Float[Array, "n outputs"]:
        if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ModelError(
                f"inputs {ids.dtype}{list(ids.shape)} are no token ids; encoder.tokenise(texts) makes them."
            )
        if ids.shape[1] > self.length:
            raise ModelError(f"texts have {ids.shape[1]} tokens, more than the {self.length} that are read; cut them.")

        def table(rows: int, name: str) -> nn.Embed:
            start = nn.initializers.normal(0.02)
            return nn.Embed(rows, self.width, embedding_init=start, dtype=self.dtype, name=f"embeddings.{name}")

        there = ids != self.padding
        x = table(self.vocabulary, "word_embeddings")(ids)
        x = x + table(self.types, "token_type_embeddings")(jnp.zeros((1, 1), jnp.int32))
        x = x + table(self.length, "position_embeddings")(jnp.arange(ids.shape[1])[None])
        norm: dict[str, Any] = {"epsilon": self.epsilon, "dtype": self.dtype, "use_fast_variance": False}
        x = nn.LayerNorm(**norm, name="embeddings.LayerNorm")(x)
        for i in range(self.depth):
            x = _Block(self.heads, self.hidden, self.activation, norm, name=f"encoder.layer.{i}")(x, there)
        x = widened(x)
        if self.pooling == "cls":
            z = x[:, 0]
        else:
            weights = there.astype(x.dtype)
            z = jnp.einsum("nt,ntw->nw", weights, x) / jnp.maximum(weights.sum(axis=1, keepdims=True), 1e-9)
        if self.unit:
            z = z / jnp.sqrt(jnp.maximum(jnp.square(z).sum(axis=1, keepdims=True), 1e-24))
        return z if self.outputs is None else widened(nn.Dense(self.outputs, dtype=self.dtype, name="head")(z))


class _Block(nn.Module):
    """Attention, then a perceptron for each token; what comes in is added and normalised after each."""

    heads: int
    hidden: int
    activation: str
    norm: Any

    @nn.compact
    def __call__(self, x: Array, there: Array) -> Array:
        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.norm["dtype"], name=name)

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(**self.norm, name=name)

        width = x.shape[-1]
        q, k, v = (dense(width, f"attention.self.{name}")(x) for name in ("query", "key", "value"))
        z = dense(width, "attention.output.dense")(attend(q, k, v, self.heads, there))
        x = norm("attention.output.LayerNorm")(x + z)
        z = _ACTIVATIONS[self.activation](dense(self.hidden, "intermediate.dense")(x))
        return norm("output.LayerNorm")(x + dense(width, "output.dense")(z))


@dataclass(frozen=True)
class SentenceEncoder:
    """Texts to embeddings, as `jmeta.sentence_encoder` reads it from a folder.

    Args:
        module: the network in Flax Linen, from token ids to embeddings.
        params: its weights.
        tokenizer: of the library `tokenizers`.
        longest: most tokens of a text; what comes after is not read.
    """

    module: Bert
    params: Params
    tokenizer: Any
    longest: int

    @property
    def model(self) -> Model:
        """The network for any learner, with token ids as inputs; it starts at the weights of the folder."""
        return pretrained(linen(self.module), self.params)

    def tokenise(self, texts: Sequence[str], width: int | None = None) -> Int[np.ndarray, "n width"]:
        """Texts as rows of token ids, filled up by the id of padding.

        Args:
            texts: what to read; those that are too long are cut.
            width: ids a row; default: those of the longest text.

        Returns:
            `[n, width]`, int32.

        Raises:
            DataError: no texts.
        """
        texts = list(texts)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise DataError("there are no texts to read, or some are no text; give a list of strings.")
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(min(width or self.longest, self.longest))
        rows = [encoded.ids for encoded in self.tokenizer.encode_batch(texts)]
        ids = np.full((len(rows), width or max(map(len, rows))), self.module.padding, np.int32)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = tokens
        return ids

    def __call__(self, texts: Sequence[str], *, batch: int = 64) -> Float[np.ndarray, "n features"]:
        """The embedding of each text, those of like length together.

        Args:
            texts: what to read; those that are too long are cut.
            batch: texts at a time.

        Returns:
            `[n, features]`.
        """
        ids, padding = self.tokenise(texts), self.module.padding
        length = (ids != padding).sum(axis=1)
        order, parts = np.argsort(length, kind="stable"), []
        for start in range(0, len(ids), batch):
            rows = order[start : start + batch]
            width = min(-(-int(length[rows].max()) // _STEP) * _STEP, self.module.length)
            here = np.full((min(batch, len(ids)), width), padding, np.int32)
            here[: len(rows), : ids.shape[1]] = ids[rows, :width]
            parts.append(np.asarray(_embeddings(self.module, self.params, jnp.asarray(here)))[: len(rows)])
        return np.concatenate(parts)[np.argsort(order)]


@partial(jax.jit, static_argnums=0)
def _embeddings(module: Bert, params: Params, ids: Int[Array, "n tokens"]) -> Float[Array, "n features"]:
    return jnp.asarray(module.apply({"params": params}, ids))


def sentence_encoder(folder: str | Path) -> SentenceEncoder:
    """A pretrained encoder of sentences: BERT and what has its form (MiniLM, BGE, E5, GTE), from files of your own.

    Args:
        folder: as sentence-transformers writes it: `model.safetensors`, `config.json`, `tokenizer.json`, and
            `modules.json` with pooling (mean or first token) and scaling to length 1. Without `modules.json`: the mean.

    Returns:
        The encoder. `encoder(texts)` gives embeddings `[n, features]`, for `jmeta.from_embeddings`; `encoder.model` and
        `encoder.tokenise(texts)` are network and inputs for a learner that fine-tunes it.

    Raises:
        CheckpointError: a file is missing or damaged.
        ConfigError: `tokenizers` is not installed.
        ModelError: the folder is of another architecture.

    Example:
        >>> import jmeta
        >>> encoder = jmeta.sentence_encoder("all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> encoder(["pay my bill", "book a flight"]).shape  # doctest: +SKIP
        (2, 384)

    Reference: Reimers, Gurevych 2019, "Sentence-BERT", https://arxiv.org/abs/1908.10084.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError("jmeta.sentence_encoder needs tokenizers: pip install tokenizers.") from error
    place = Path(folder).expanduser()
    if not (place / "config.json").exists():
        raise CheckpointError(f"{folder} has no config.json; name a folder that sentence-transformers wrote.")
    module = _network(place)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(place / "tokenizer.json"))
    except Exception as error:  # tokenizers raises plain exceptions on a file that is missing or not its own
        raise CheckpointError(f"{place / 'tokenizer.json'} is missing or damaged; get the folder anew.") from error
    like, _ = jax.eval_shape(linen(module).init, jax.random.key(0), jnp.ones((1, 2), jnp.int32))
    params, matched = load_params(place / "model.safetensors", like, names=_plain)
    if matched.missing:
        raise ModelError(f"{folder} is of another architecture: {matched}; give a folder of the BERT family.")
    longest = _json(place / "sentence_bert_config.json", default={}).get("max_seq_length") or module.length
    return SentenceEncoder(module, params, tokenizer, min(longest, module.length))


def _plain(name: str) -> str:
    return name.removeprefix("bert.")


def _network(folder: Path) -> Bert:
    """The network that the files of a folder say."""
    config = _json(folder / "config.json")
    kind, places = config.get("model_type"), config.get("position_embedding_type", "absolute")
    if kind != "bert" or places != "absolute" or config.get("hidden_act") not in _ACTIVATIONS:
        raise ModelError(
            f"{folder} is of another architecture, {kind!r} with {places} positions and {config.get('hidden_act')!r}; "
            "give a folder of the BERT family."
        )
    parts = [part["type"].rpartition(".")[2] for part in _json(folder / "modules.json", default=[])]
    unit, pooling = "Normalize" in parts, "mean"
    if strange := set(parts) - {"Transformer", "Pooling", "Normalize"}:
        raise ModelError(f"{folder} has a part {strange.pop()!r} that is not known; give a folder without it.")
    if "Pooling" in parts:
        about = _json(folder / _json(folder / "modules.json")[parts.index("Pooling")]["path"] / "config.json")
        on = {name.removeprefix("pooling_mode_") for name, value in about.items() if value is True}
        on = on & {"cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"}
        on |= {f"{mode}_token{'s' * (mode != 'cls')}" for mode in [about.get("pooling_mode")] if mode}
        if on not in ({"cls_token"}, {"mean_tokens"}):
            raise ModelError(f"{folder} pools by {', '.join(sorted(on))}; give one that pools by mean or first token.")
        pooling = "cls" if on == {"cls_token"} else "mean"
    try:
        return Bert(
            None,
            vocabulary=config["vocab_size"],
            width=config["hidden_size"],
            depth=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            hidden=config["intermediate_size"],
            length=config["max_position_embeddings"],
            types=config["type_vocab_size"],
            activation=config["hidden_act"],
            epsilon=config["layer_norm_eps"],
            pooling=pooling,  # type: ignore[arg-type]
            unit=unit,
            padding=config.get("pad_token_id", 0),
        )
    except KeyError as error:
        raise CheckpointError(f"{folder / 'config.json'} does not tell {error}; get the folder anew.") from error


def _json(file: Path, default: Any = None) -> Any:
    if default is not None and not file.exists():
        return default
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is missing or damaged; get the folder anew.") from error
