r"""Measure the Space in headless Chromium: time to the first mask, encoder, and seconds per sample.

    python training/export_onnx.py --model model_cards/psam-lidc --output model_cards/psam-lidc/onnx
    python training/report/bench_space.py --model model_cards/psam-lidc --output training/results/space.json

Needs npm, chromium and chromedriver, and an otherwise idle machine. Page and model come from a server on this machine,
so the time to the first mask is without the time of a download. Every repeat is a visitor's first visit.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selenium.webdriver.support.ui import WebDriverWait

from probabilistic_sam.errors import UserError, run
from probabilistic_sam.files import write_json
from probabilistic_sam.hub.space import PACKAGES, stage_space
from probabilistic_sam.onnx_export import GRAPHS
from probabilistic_sam.provenance import provenance

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))
from chromium import start_chromium  # noqa: E402
from space_server import SpaceServer  # noqa: E402

PAGE = ROOT / "model_cards" / "psam-lidc-space"
NUM_SAMPLES = 16
LONGEST = 300  # seconds for one action of the page
# From the click until the browser has painted the result
CLICK = """const [done] = arguments, start = performance.now(), find = (id) => document.getElementById(id);
    const look = () => {
      if (!find("error").hidden) done("error: " + find("error").textContent);
      else if (find("results").hidden) requestAnimationFrame(look);
      else requestAnimationFrame(() => done((performance.now() - start) / 1000));
    };
    find("count").value = 1;
    find("sample").click();
    look();"""
# Another box, so that the window is encoded again
SAMPLE = """const [numSamples, done] = arguments;
    psam.sample({ box: [50, 50, 74, 74], numSamples }).then(
      ({ seconds, device }) => done({ seconds, device }), (error) => done("error: " + error.message));"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a model with an exported folder onnx")
    parser.add_argument("--output", type=Path, required=True, help="results file to write (JSON)")
    parser.add_argument("--repeats", type=int, default=5, help="first visits that are measured; default 5")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        raise UserError("--repeats must be 1 or more")
    missing = [name for name in GRAPHS if not (args.model / "onnx" / f"{name}.onnx").is_file()]
    if missing:
        raise UserError(f"no {missing[0]}.onnx in {args.model / 'onnx'}; accepted: the output of export_onnx.py")
    return args


def answer(value: Any) -> Any:
    """What the page returned.

    Raises:
        UserError: the page's error.
    """
    if isinstance(value, str):
        raise UserError(f"the page says {value}")
    return value


def visit(url: str, folder: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of one first visit; device and browser."""
    folder.mkdir()
    driver = start_chromium(folder, "browser")
    try:
        driver.set_script_timeout(LONGEST)
        driver.get(url)
        position = "return document.getElementById('position').textContent.startsWith('Box')"  # of the first example
        WebDriverWait(driver, LONGEST).until(lambda browser: browser.execute_script(position))
        first = answer(driver.execute_async_script(CLICK))
        result = answer(driver.execute_async_script(SAMPLE, NUM_SAMPLES))
        browser = f"Chromium {driver.capabilities['browserVersion']}, headless"
    finally:
        driver.quit()
    seconds = {
        "first_mask": first,
        "encoder": result["seconds"]["encoder"],
        "per_sample": result["seconds"]["samples"] / NUM_SAMPLES,
    }
    return seconds, {"device": result["device"], "browser": browser}


def main(argv: Sequence[str] | None = None) -> None:
    """Stage and serve the Space, visit it, write the results file."""
    args = parse_args(argv)
    origin, load = provenance(ROOT, ("onnxruntime",)), os.getloadavg()
    visits: list[dict[str, float]] = []
    where: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        stage_space(PAGE, folder / "staged", "org/psam-lidc")
        with SpaceServer(folder / "staged", args.model) as server:
            for number in range(args.repeats):
                seconds, where = visit(server.url, folder / str(number))
                visits.append(seconds)
                print(" ".join(f"{name} {value:.3f}" for name, value in seconds.items()), flush=True)
            # The decoder of points is fetched after the first mask
            needed = ("vision_encoder.onnx", "box_decoder.onnx", ".wasm")
            loaded = {name for _, name in server.requests if name.endswith(needed)}
            sizes = {
                name: path.stat().st_size
                for name in sorted(loaded)
                for path in (folder / "staged" / name, args.model / name)
                if path.is_file()
            }
    content = {
        "model": args.model.name, "num_samples": NUM_SAMPLES, **where, "bytes": sizes,
        "seconds": {name: statistics.median(visit[name] for visit in visits) for name in visits[0]},
        "ranges": {name: [f(visit[name] for visit in visits) for f in (min, max)] for name in visits[0]},
        "repeats": args.repeats, "cpus": os.cpu_count(), "load_at_start": round(load[0], 2),
        "packages": {package.name: package.version for package in PACKAGES},
    }  # fmt: skip
    write_json(args.output, content | origin)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run(main)
