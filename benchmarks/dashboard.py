"""Measure the dashboard of an SAE: seconds to make it, memory, size, and milliseconds until a browser shows it.

    python benchmarks/dashboard.py runs/<sweep>/<name>/step-000146

Each run is the whole command, `python results.py dashboard`, in its own process. First paint is the first contentful
paint of the file in headless Chromium, after an empty page. This needs Debian's chromium and chromium-driver, and
selenium from requirements-dev.txt.
"""

import resource
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait
from timing import machine, median, print_table, write_json

COMMAND = [sys.executable, str(Path(__file__).parent.parent / "results.py"), "dashboard"]
FIRST_PAINT = "return performance.getEntriesByName('first-contentful-paint').map((entry) => entry.startTime)"


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--windows", default="1024")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--loads", type=int, default=9)
    parser.add_argument("--json", type=Path, help="file for the figures, in seconds and bytes")
    return parser.parse_args()


def main(options: Namespace) -> None:
    where = machine(torch.device("cpu"))
    print(where)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        command = [*COMMAND, options.checkpoint, "--windows", options.windows, "--output", str(page)]
        made = []
        for _ in range(options.repeats):
            start = time.perf_counter()
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            made.append(time.perf_counter() - start)
        print(done.stdout.split(":")[0])
        size, peak = page.stat().st_size, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        painted = first_paints(page, options.loads)
    figures = {"seconds": made, "bytes": size, "peak_bytes": peak, "first_paint": painted}
    rows = [
        {"": "to make it, s", "median": f"{median(made):.1f}", "range": f"{min(made):.1f}-{max(made):.1f}"},
        {"": "its process's peak, MB", "median": f"{peak / 1e6:.0f}", "range": ""},
        {"": "the file, MB", "median": f"{size / 1e6:.1f}", "range": ""},
        {
            "": "first paint, ms",
            "median": f"{median(painted) * 1e3:.0f}",
            "range": f"{min(painted) * 1e3:.0f}-{max(painted) * 1e3:.0f}",
        },
    ]
    print_table(rows)
    write_json(options.json, {"machine": where, "figures": figures})


def first_paints(page: Path, loads: int) -> list[float]:
    """Load the page several times; return the seconds from the start of each load to its first paint."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"):
        options.add_argument(argument)
    seconds = []
    with webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver")) as browser:
        for _ in range(loads):
            browser.get("about:blank")
            browser.get(page.as_uri())
            (paint,) = WebDriverWait(browser, 10).until(lambda browser: browser.execute_script(FIRST_PAINT))
            seconds.append(paint / 1e3)
    return seconds


if __name__ == "__main__":
    main(parse())
