"""The generation engine: the one file that imports vLLM.

`Engine.stream` feeds prompts as places become free and yields each prompt as soon as its last sample is finished, so
that the caller can put it on disk, and no batch waits for its slowest member.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hps.chat import load_tokenizer, same_tokens, sampled_text
from hps.errors import InputError
from pipeline.recipe import Generation, Model
from pipeline.weights import adapter_deltas, load_config, mergeable

# Read by vLLM at import. No usage reports; errors only: on a CPU a screen of warnings says what vLLM does without.
_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
# On a CPU the engine runs in our process: otherwise three processes import vLLM, which is most of its start, and there
# is no device whose work a second process could overlap with.
_CPU_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
# We have asked CUDA whether it is there, and a process forked after that cannot use it.
# FlashInfer's sampler is compiled at the start, by nvcc and ninja, which most machines do not have on the PATH (vllm
# #49497). It takes no seeds, so our requests would never use it.
_CUDA_ENVIRONMENT = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
# KV cache on a CPU, in bytes. vLLM's own default takes a share of all memory, which a laptop also needs for the rest.
CPU_KV_CACHE_BYTES = 2 * 2**30


LORA_RANKS = (8, 16, 32, 64, 128, 256)  # of those that vLLM takes
MOST_ADAPTERS = 4  # at work at a time; prompts come sorted by adapter, so that two or three overlap


@dataclass
class Sample:
    """One sampled response: `text` without special tokens, its `tokens`, and whether the length limit cut it."""

    text: str
    tokens: int
    truncated: bool


class Engine:
    """vLLM with one model.

    Args:
        model: folder or hub name, with revision.
        settings: the recipe's `generation` section.
        stop_ids: token ids that end a turn.
        seed: seeds the engine. On CUDA every prompt also has its own seed, so its samples depend less on the
            prompts around it. On a CPU per-request seeds crash vLLM 0.32's engine ("CPU Generator does not use
            offset") when many sequences are scheduled.
        adapters: folders of the LoRA adapters (PEFT) that prompts may ask for. On a CPU one at a time is merged into
            the weights, because vLLM's LoRA requests are slow there (docs/operations.md, "Speed").
        schema: JSON schema that every sample must follow.
    """

    def __init__(
        self,
        model: Model,
        settings: Generation,
        stop_ids: frozenset[int],
        seed: int,
        *,
        adapters: Sequence[str] = (),
        schema: dict | None = None,
    ):
        import torch

        self._cuda = torch.cuda.is_available()
        for name, value in {**_ENVIRONMENT, **(_CUDA_ENVIRONMENT if self._cuda else _CPU_ENVIRONMENT)}.items():
            os.environ.setdefault(name, value)
        # vLLM warns about triton before it reads its own setting; so does torch, where triton is not installed.
        for noisy in ("vllm", "torch._library.triton"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        from vllm import LLM

        self._settings, self._stop_ids, self._seed = settings, sorted(stop_ids), seed
        self._schema = schema
        self._tokenizer = load_tokenizer(model.path, model.revision)
        # vLLM loads tokenizers by its own rules. It gets ours as a folder, for schemas; texts are decoded here.
        self._folder = tempfile.TemporaryDirectory()
        self._tokenizer.save_pretrained(self._folder.name)
        # Without a configuration beside it vLLM tries twice to read one, waits in between and prints errors.
        load_config(model).save_pretrained(self._folder.name)
        # vLLM knows adapters by numbers from 1.
        self._adapters = {path: number for number, path in enumerate(adapters, 1)}
        self._merges = not self._cuda and all(mergeable(Path(adapter)) for adapter in adapters)
        self._merged: str | None = None  # what the weights contain
        self._engine = LLM(
            model=model.path,
            revision=model.revision,
            tokenizer=self._folder.name,
            dtype=settings.dtype if settings.dtype != "auto" or self._cuda else "float32",
            max_model_len=settings.max_prompt_tokens + settings.max_new_tokens,
            max_num_seqs=settings.max_sequences,  # None: vLLM's own for the device
            tensor_parallel_size=settings.tensor_parallel,
            # torch.compile needs minutes to start and gains nothing on a CPU.
            enforce_eager=settings.enforce_eager or not self._cuda,
            seed=seed,
            generation_config="vllm",  # no penalty or cut-off that the model's folder asks for: the recipe samples
            load_format="safetensors",  # a pickle can run code when it is loaded, and so can a model's own files
            trust_remote_code=False,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **self._options(),
        ).llm_engine
        self._places = self._engine.vllm_config.scheduler_config.max_num_seqs
        if schema and not same_tokens(self._tokenizer, self._engine.get_tokenizer()):
            problem = "vLLM reads the tokenizer differently, so answers could not follow a schema"
            raise InputError(problem, where=model.path, remedy="use another judge")

    def _options(self) -> dict[str, Any]:
        """vLLM's options that depend on device, adapters and schema."""
        settings, adapters = self._settings, self._adapters
        options: dict[str, Any] = {"gpu_memory_utilization": settings.gpu_memory_utilization}
        if not self._cuda:
            options = {"kv_cache_memory_bytes": CPU_KV_CACHE_BYTES}
        if adapters and self._merges:
            options["worker_extension_cls"] = f"{__name__}.{Merging.__name__}"
        elif adapters:
            options |= {"enable_lora": True, "max_lora_rank": max(map(_rank_place, adapters))}
            options["max_loras"] = min(len(adapters), MOST_ADAPTERS)
        if settings.tensor_parallel > 1:  # all GPUs of an engine are on one node, in a Ray actor too
            options["distributed_executor_backend"] = "mp"
        if self._schema:  # compact, because a weak model would fill its length with white space between the fields
            options["structured_outputs_config"] = {"backend": "xgrammar", "disable_any_whitespace": True}
        return options

    def stream(
        self, prompts: Iterable[tuple[str, list[int], int] | tuple[str, list[int], int, str | None] | None]
    ) -> Iterator[tuple[str, list[Sample]]]:
        """Sample; yield `(key, samples)` in the order of finishing.

        Args:
            prompts: `(key, token ids, number of samples)` and, where one of `adapters` is to answer, its folder; keys
                are unique. Those of one adapter should follow one another. Read lazily, while fewer samples are
                unfinished than twice what the engine writes at a time. None: there is no more at the moment.
        """
        source, held = iter(prompts), None
        waiting: set[str] = set()
        exhausted = False
        while True:
            # vLLM counts samples: a prompt whose last sample is long leaves the places of its others.
            while not exhausted and self._engine.get_num_unfinished_requests() < 2 * self._places:
                try:
                    item = held or next(source)
                except StopIteration:
                    exhausted = True
                    break
                if item is None:
                    break
                key, ids, count, *rest = item
                adapter = rest[0] if rest else None
                held = None
                if self._merges and adapter != self._merged:
                    if waiting:  # for answers of the weights as they are
                        held = item
                        break
                    self._merge(adapter)
                lora, sampling = self._lora(adapter), self._sampling(key, count)
                self._engine.add_request(key, {"prompt_token_ids": ids}, sampling, lora_request=lora)
                waiting.add(key)
            if not waiting:
                if exhausted:
                    return
                continue
            for output in self._engine.step():
                if output.finished:
                    waiting.remove(output.request_id)
                    yield output.request_id, [self._sample(part) for part in output.outputs]

    def _lora(self, adapter: str | None):
        from vllm.lora.request import LoRARequest

        return LoRARequest(adapter, self._adapters[adapter], adapter) if adapter and not self._merges else None

    def _merge(self, adapter: str | None) -> None:
        """Give the model the weights with this adapter, or its own (None), while no prompt is at work."""
        self._merged = ""  # neither: after a failure halfway the next prompt has all weights replaced
        self._engine.collective_rpc("load_merged", args=(adapter,))
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM keeps prompts that the earlier weights computed")
        self._merged = adapter

    def _sampling(self, key: str, count: int):
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        return SamplingParams(
            n=count,
            temperature=self._settings.temperature,
            top_p=self._settings.top_p,
            max_tokens=self._settings.max_new_tokens,
            stop_token_ids=self._stop_ids,
            seed=_request_seed(self._seed, key) if self._cuda else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
            structured_outputs=StructuredOutputsParams(json=self._schema) if self._schema else None,
            detokenize=False,
        )

    def _sample(self, part) -> Sample:
        # vLLM lists the end-of-turn token among the generated ones.
        truncated = part.finish_reason == "length"
        ids = list(part.token_ids) if truncated else list(part.token_ids)[:-1]
        return Sample(text=sampled_text(self._tokenizer, ids, truncated), tokens=len(ids), truncated=truncated)


class Merging:
    """What the engine's worker can do in addition (vLLM's `worker_extension_cls`)."""

    load_config: Any  # of the worker, as all these
    model_config: Any
    get_model: Any
    reload_weights: Any

    def load_merged(self, adapter: str | None) -> None:
        """Read all weights again from the model's files, so that nothing of an earlier adapter stays; add this one."""
        from vllm.model_executor.model_loader import get_model_loader

        deltas = adapter_deltas(Path(adapter)) if adapter else {}
        weights = get_model_loader(self.load_config).get_all_weights(self.model_config, self.get_model())
        self.reload_weights(
            (name, weight.float() + deltas.pop(name) if name in deltas else weight) for name, weight in weights
        )
        if deltas:
            problem = f"the adapter changes `{next(iter(deltas))}`, which the model does not have"
            raise InputError(problem, where=str(adapter), remedy="give the adapter of this model")


def _rank_place(adapter: str) -> int:
    """The room that vLLM makes for an adapter: the smallest of its sizes that fits the rank."""
    rank = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    return next((size for size in LORA_RANKS if size >= rank), rank)


def _request_seed(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:4], "big") & 0x7FFFFFFF
