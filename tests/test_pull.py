"""Pulling a pushed model by its Hub name in new processes, with and without the package."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from endpoint_server import load_handler
from loopback_hub import LoopbackHub
from tiny import SIZE, tiny_model
from transformers import AutoModel, AutoProcessor, pipeline

from probabilistic_sam import ProbabilisticMaskGenerationPipeline, ProbabilisticSamModel, ProbabilisticSamProcessor
from probabilistic_sam.hub.staging import EXAMPLES

pytestmark = pytest.mark.slow  # each process loads torch and transformers

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "training" / "push_to_hub.py"
NAME = "org/psam-tiny"
BOX = [8, 10, 30, 31]

# Prologue and epilogue of the code that runs in a process. "installed": no code of the repository may run. "absent":
# the package cannot be imported, even if it is on the path.
PACKAGE = {
    "installed": """
import probabilistic_sam
""",
    "absent": """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "probabilistic_sam":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
try:
    import probabilistic_sam
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the package can be imported")
""",
}
END = {
    "installed": """
import sys
assert not any(name.startswith("transformers_modules") for name in sys.modules), "code of the repository ran"
""",
    "absent": """
import sys
assert not any(name.split(".")[0] == "probabilistic_sam" for name in sys.modules)
""",
}
GIVEN = """
import os
import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskGeneration, AutoProcessor, pipeline

name, box, image = "org/psam-tiny", [8, 10, 30, 31], np.load("image.npy")
saved = {}

def sample(model, processor):
    inputs = processor(image, input_boxes=[[box]])
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return model.sample(**inputs, num_samples=3, generator=torch.Generator().manual_seed(0)).pred_masks.float().numpy()

def mask_arrays(results):
    return {key: results[0][key] for key in ("masks", "mean", "uncertainty", "areas")}
"""
MODELS = """
processor = AutoProcessor.from_pretrained(name, **trust)
for model_class in (AutoModel, AutoModelForMaskGeneration):
    saved[model_class.__name__] = sample(model_class.from_pretrained(name, **trust), processor)
"""
PIPELINES = """
import datasets
import PIL.Image

pipe = pipeline("probabilistic-mask-generation", model=name, **trust)
one = pipe(image, boxes=[box], num_samples=3, seed=1)
listed = pipe([image, image[::-1].copy()], boxes=[box], num_samples=3, seed=1, batch_size=2)
images = {"image": [PIL.Image.fromarray(item) for item in (image, image[::-1].copy())]}
column = datasets.Dataset.from_dict(images, features=datasets.Features({"image": datasets.Image()}))["image"]
from_column = list(pipe(column, boxes=[box], num_samples=3, seed=1, batch_size=2))
for key, results in {"one": one, "first": listed[0], "second": listed[1], "third": from_column[1]}.items():
    saved |= {f"{key}/{part}": value for part, value in mask_arrays(results).items()}
"""
OPTIONS = """
from probabilistic_sam import ProbabilisticSamModel, ProbabilisticSamProcessor

processor = ProbabilisticSamProcessor.from_pretrained(name)
saved["main"] = sample(ProbabilisticSamModel.from_pretrained(name), processor)
saved["pinned"] = sample(ProbabilisticSamModel.from_pretrained(name, revision=os.environ["FIRST"]), processor)
half = ProbabilisticSamModel.from_pretrained(name, dtype=torch.bfloat16)
assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
saved["half"] = sample(half, processor)
placed = ProbabilisticSamModel.from_pretrained(name, device_map="cpu")
assert placed.device.type == "cpu"
saved["placed"] = sample(placed, processor)
"""
TRUST = {"installed": "trust = {}\n", "absent": 'trust = {"trust_remote_code": True}\n'}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the subprocesses: with more threads, sums differ in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def python(hub, home, package, *lines, **variables):
    """Run code in a process whose working directory is outside of this project."""
    code = "".join((PACKAGE[package], TRUST[package], *lines, END[package], '\nnp.savez("saved.npz", **saved)\n'))
    home.mkdir(exist_ok=True, parents=True)
    np.save(home / "image.npy", picture())
    environment = os.environ | hub.environment(home / "hub") | {"OMP_NUM_THREADS": "1", **variables}
    environment["PYTHONPATH"] = str(ROOT) if package == "installed" else ""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=home, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(stdout=done.stdout, **dict(np.load(home / "saved.npz")))


def picture():
    y, x = np.mgrid[:48, :40]
    noise = np.random.default_rng(0).integers(0, 60, size=(48, 40))
    return (noise + 150 * (np.hypot(x - 18, y - 20) < 9)).astype(np.uint8)


def sample(folder):
    """Samples of the model in a folder, from the package in this process."""
    model = ProbabilisticSamModel.from_pretrained(folder)
    inputs = ProbabilisticSamProcessor.from_pretrained(folder)(picture(), input_boxes=[[BOX]])
    return model.sample(**inputs, num_samples=3, generator=torch.Generator().manual_seed(0)).pred_masks.numpy()


def push(hub, home, model, *more):
    command = [sys.executable, str(SCRIPT), "--model", str(model), "--repo-id", NAME, *more]
    environment = os.environ | hub.environment(home) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].rsplit("/", 1)[-1]


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A model and then a second one with sharded weights, pushed to the same repository."""
    folder = tmp_path_factory.mktemp("pushed")
    tiny_model().save_pretrained(folder / "first")
    tiny_model(seed=1).save_pretrained(folder / "sharded", max_shard_size="20KB")
    for name in ("first", "sharded"):
        ProbabilisticSamProcessor(SIZE, 24).save_pretrained(folder / name)
    with LoopbackHub() as hub:
        commits = [push(hub, folder / "home", folder / name) for name in ("first", "sharded")]
        yield SimpleNamespace(hub=hub, folder=folder, repo=hub.repos["model", NAME], commits=commits)


def test_each_push_is_one_commit_without_files_of_the_previous_one(pushed):
    assert list(pushed.repo.commits)[1:] == pushed.commits  # a new repository has an empty first commit
    first, second = (pushed.repo.files(commit) for commit in pushed.commits)
    assert "model.safetensors" in first and "model.safetensors" not in second
    shards = [name for name in second if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]
    assert len(shards) > 1 and "model.safetensors.index.json" in second
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in (*first, *second))


@pytest.fixture(scope="module")
def pulled_without_package(pushed):
    return python(pushed.hub, pushed.folder / "absent", "absent", GIVEN, MODELS)


def test_models_load_without_trust_if_the_package_is_installed(pushed):
    pulled = python(pushed.hub, pushed.folder / "installed", "installed", GIVEN, MODELS)
    expected = sample(pushed.folder / "sharded")
    assert np.array_equal(pulled.AutoModel, expected) and np.array_equal(pulled.AutoModelForMaskGeneration, expected)


def test_models_load_with_trust_without_the_package_and_give_the_same_samples(pushed, pulled_without_package):
    expected = sample(pushed.folder / "sharded")
    for name in ("AutoModel", "AutoModelForMaskGeneration"):
        assert np.array_equal(getattr(pulled_without_package, name), expected)


def test_pulled_models_load_offline(pushed, pulled_without_package):
    dead = {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HUB_OFFLINE": "1"}
    again = python(pushed.hub, pushed.folder / "absent", "absent", GIVEN, MODELS, **dead)
    assert np.array_equal(again.AutoModel, pulled_without_package.AutoModel)


@pytest.mark.parametrize("package", ["installed", "absent"])
def test_pipeline_accepts_an_image_a_list_and_a_column(pushed, package):
    pulled = python(pushed.hub, pushed.folder / f"pipeline-{package}", package, GIVEN, PIPELINES)
    pipe = ProbabilisticMaskGenerationPipeline(
        model=ProbabilisticSamModel.from_pretrained(pushed.folder / "sharded"),
        processor=ProbabilisticSamProcessor.from_pretrained(pushed.folder / "sharded"),
    )
    images = [picture(), picture()[::-1].copy()]
    expected = [pipe(image, boxes=[BOX], num_samples=3, seed=1)[0] for image in images]
    assert expected[0]["masks"].shape == (3, 48, 40)
    for part in ("masks", "mean", "uncertainty", "areas"):
        for key, index in (("one", 0), ("first", 0), ("second", 1), ("third", 1)):
            actual = getattr(pulled, f"{key}/{part}")
            if key == "one":
                assert np.array_equal(actual, expected[index][part]), (key, part)
            else:  # a batch of two changes the order of summation
                np.testing.assert_allclose(actual, expected[index][part], atol=1e-4, err_msg=f"{key}/{part}")


def test_options_of_from_pretrained(pushed):
    pulled = python(pushed.hub, pushed.folder / "options", "installed", GIVEN, OPTIONS, FIRST=pushed.commits[0])
    first, second = sample(pushed.folder / "first"), sample(pushed.folder / "sharded")
    assert not np.array_equal(first, second)
    assert np.array_equal(pulled.main, second) and np.array_equal(pulled.placed, second)
    assert np.array_equal(pulled.pinned, first)
    assert pulled.half.shape == second.shape and np.isfinite(pulled.half).all()
    spread = second.std()
    assert 0 < np.abs(pulled.half - second).mean() < 0.2 * spread  # equal within the precision of bfloat16


# ----------------------------------------------------------------------------------------------------- shipped weights

# The tests above use SAM's encoder. The shipped weights have a TinyViT encoder, whose code is in the repository, too.
CARD = ROOT / "model_cards" / "psam-lidc"
TASK = "probabilistic-mask-generation"
EXAMPLE = EXAMPLES / "phantom-1.png"
EXAMPLE_BOX = json.loads((EXAMPLES / "examples.json").read_text())["images"][0]["box"]
CODE = {
    "configuration_probabilistic_sam.py", "loss_probabilistic_sam.py", "modeling_mask_decoder.py",
    "modeling_probabilistic_sam.py", "modeling_tiny_vit.py",
    "pipeline_probabilistic_sam.py", "processing_image_files.py", "processing_probabilistic_sam.py",
}  # fmt: skip
WAYS = """
import copy, json, os, sys
from pathlib import Path
import numpy as np
import PIL.Image
import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModel, AutoModelForMaskGeneration, AutoProcessor, pipeline

saved, handler_folder, example, box = {}, *json.loads(os.environ["GIVEN"])
image = np.asarray(PIL.Image.open(example))
sys.path.insert(0, handler_folder)
from handler import EndpointHandler

def sample(model, processor):
    inputs = processor(image, input_boxes=[[box]])
    return model.sample(**inputs, num_samples=3, generator=torch.Generator().manual_seed(0)).pred_masks.numpy()

def ways(name):
    # All ways to load a model; for a folder, also the endpoint handler
    processor = AutoProcessor.from_pretrained(name, **trust)
    model = AutoModel.from_pretrained(name, **trust)
    mask_generation = AutoModelForMaskGeneration.from_pretrained(name, **trust)
    built = AutoModel.from_config(AutoConfig.from_pretrained(name, **trust), **trust).eval()
    built.load_state_dict(model.state_dict(), assign=True)  # the same memory layout, hence the same rounding
    pipe = pipeline("probabilistic-mask-generation", model=name, **trust)
    for way, opened in {"AutoModel": model, "AutoModelForMaskGeneration": mask_generation, "config": built}.items():
        saved[f"{name}/{way}"] = sample(opened, processor)
    saved[f"{name}/pipeline"] = pipe(image, boxes=[box], num_samples=3, seed=1)[0]["mean"]
    if Path(name).is_dir():
        request = {"inputs": PIL.Image.open(example), "parameters": {"boxes": [box], "num_samples": 3}}
        saved[f"{name}/handler"] = np.array(json.dumps(EndpointHandler(name)(request)))
    return model, mask_generation, processor, pipe

def save(folder, *parts):
    for part in parts:
        part.save_pretrained(folder)
"""
FROM_FOLDER = """
model, mask_generation, processor, pipe = ways("copy")
save("again", mask_generation, processor)
save("piped", pipe)
"""
FROM_SAVED = """
model, mask_generation, processor, pipe = ways("again")
save("third", processor, model)
save("third-piped", pipe)
"""
BY_NAME = """
model, mask_generation, processor, pipe = ways("org/psam-tiny")
save("again", mask_generation, processor)
os.symlink(snapshot_download("org/psam-tiny"), "snapshot")  # its files are symbolic links
ways("snapshot")
"""


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The shipped weights on the Hub and as a folder, `home / "copy"`."""
    folder = tmp_path_factory.mktemp("shipped")
    with LoopbackHub() as hub:
        push(hub, folder / "home", CARD)
        files = hub.repos["model", NAME].files()
        for name, content in files.items():
            path = folder / "folder" / "copy" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        yield SimpleNamespace(hub=hub, home=folder / "folder", elsewhere=folder / "elsewhere", files=files)


@pytest.fixture(scope="module")
def opened(shipped):
    """`home / "copy"` loaded without the package and saved to "again" and "piped"."""
    return ways_without_package(shipped, shipped.home, FROM_FOLDER)


def ways_without_package(shipped, home, lines):
    given = json.dumps([str(shipped.home / "copy"), str(EXAMPLE), EXAMPLE_BOX])
    return vars(python(shipped.hub, home, "absent", WAYS, lines, GIVEN=given))


def assert_as_with_the_package(results, name, folder):
    """All results for `name` are bit-identical to those of the package for `folder`."""
    image = np.asarray(PIL.Image.open(EXAMPLE))
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert type(model) is ProbabilisticSamModel and type(processor) is ProbabilisticSamProcessor
    inputs = processor(image, input_boxes=[[EXAMPLE_BOX]])
    samples = model.sample(**inputs, num_samples=3, generator=torch.Generator().manual_seed(0)).pred_masks.numpy()
    assert (samples > 0).any()
    for way in ("AutoModel", "AutoModelForMaskGeneration", "config"):
        assert np.array_equal(results[f"{name}/{way}"], samples), way
    piped = pipeline(TASK, model=model, processor=processor)(image, boxes=[EXAMPLE_BOX], num_samples=3, seed=1)
    assert np.array_equal(results[f"{name}/pipeline"], piped[0]["mean"])
    if f"{name}/handler" in results:
        request = {"inputs": PIL.Image.open(EXAMPLE), "parameters": {"boxes": [EXAMPLE_BOX], "num_samples": 3}}
        endpoint = load_handler(EXAMPLES.parent, folder)
        assert type(endpoint.pipe) is ProbabilisticMaskGenerationPipeline
        assert json.loads(str(results[f"{name}/handler"])) == endpoint(request)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shipped_folder_loads_in_all_ways_without_the_package(shipped, opened):
    assert_as_with_the_package(opened, "copy", shipped.home / "copy")


def test_saved_models_load_and_save_again(shipped, opened):
    first = content(shipped.home / "again")
    assert set(first) == CODE | {"config.json", "model.safetensors", "processor_config.json"}
    assert content(shipped.home / "piped") == first
    again = ways_without_package(shipped, shipped.home, FROM_SAVED)
    assert_as_with_the_package(again, "again", shipped.home / "again")
    for name in ("third", "third-piped"):  # a fixed point, so later generations load, too
        assert content(shipped.home / name) == first


def test_shipped_weights_load_in_all_ways_by_name_and_from_a_snapshot(shipped, opened):
    pulled = ways_without_package(shipped, shipped.elsewhere, BY_NAME)
    for name in (NAME, "snapshot"):
        assert_as_with_the_package(pulled, name, shipped.home / "copy")
    assert content(shipped.elsewhere / "again") == content(shipped.home / "again")  # no reference to the Hub


def test_models_that_the_package_loaded_from_such_a_folder_are_saved_with_code(shipped, opened, tmp_path):
    expected = content(shipped.home / "again")
    copy = shipped.home / "copy"
    for part in (ProbabilisticSamModel.from_pretrained(copy), ProbabilisticSamProcessor.from_pretrained(copy)):
        part.save_pretrained(tmp_path / "parts")
    pipeline(TASK, model=str(copy)).save_pretrained(tmp_path / "piped")
    assert content(tmp_path / "parts") == content(tmp_path / "piped") == expected


def test_code_of_the_shipped_card_runs_unchanged(shipped):
    card = shipped.files["README.md"].decode()
    blocks = re.findall(r"^```python\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL)
    blocks = [block for block in blocks if "InferenceClient" not in block]
    own, remote = "from probabilistic_sam import", "AutoModel.from_pretrained"
    assert [sum(part in block for block in blocks) for part in (own, remote, "pipeline(")] == [1, 1, 1]
    for package, other in (("installed", remote), ("absent", own)):
        lines = [block.replace("result", f"result{place}") for place, block in enumerate(blocks) if other not in block]
        keep = (
            "import numpy as np\nsaved = {n: np.asarray(v['masks']) for n, v in list(globals().items()) "
            "if n.startswith('result')}\n"
        )
        pulled = python(shipped.hub, shipped.elsewhere / package, package, *lines, keep)
        sampled, piped = (value for name, value in vars(pulled).items() if name.startswith("result"))
        assert sampled.shape == (16, 128, 128) and np.array_equal(sampled, piped)
        assert 100 < np.median(sampled.sum(axis=(1, 2))) < 1000  # a nodule with a diameter of about 23 pixels
