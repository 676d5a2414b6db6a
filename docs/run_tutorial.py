"""Runs the Python of a page, and puts what it prints and draws below each block; an error fails the build."""

import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

BLOCK = re.compile(r"^```python\n(.*?)^```\n", re.DOTALL | re.MULTILINE)


def executed(page: str, pictures: Path) -> str:
    """The page with outputs.

    Args:
        page: MyST text, whose blocks of Python share their names and run in an empty folder.
        pictures: Folder, beside the page and made anew, for a PNG of each figure that a block leaves open.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.close("all")  # what is open belongs to somebody else
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir()
    names: dict = {}
    before = Path.cwd()
    sys.path.insert(0, str(Path(__file__).parent))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            return BLOCK.sub(lambda block: block[0] + _output(block[1], names, pictures), page)
        finally:
            os.chdir(before)
            sys.path.pop(0)


def _output(code: str, names: dict, pictures: Path) -> str:
    from matplotlib import pyplot

    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(code, "<tutorial>", "exec"), names)
    except Exception as error:
        traceback.print_exc()
        raise RuntimeError(f"this block of the page does not run: {error}\n\n{code}") from error
    found = f"\n```text\n{printed.getvalue().rstrip()}\n```\n" if printed.getvalue() else ""
    for number in pyplot.get_fignums():
        figure = pyplot.figure(number)
        file = pictures / f"{len(list(pictures.glob('*.png')))}.png"
        figure.savefig(file, dpi=150, bbox_inches="tight")
        pyplot.close(figure)
        found += f"\n![What the code above draws]({pictures.name}/{file.name})\n"
    return found
