"""A hook of MkDocs: what `benchmarks/results` holds becomes pages, as it is."""

import pathlib

from mkdocs.structure.files import File

RESULTS = pathlib.Path(__file__).parent.parent / "benchmarks" / "results"


def on_config(config):
    """Lists the results under the last entry of the contents."""
    title, page = next(iter(config.nav[-1].items()))
    pages = [f"results/{path.name}" for path in sorted(RESULTS.glob("*.md"))]
    config.nav[-1] = {title: [page, *pages]}
    return config


def on_files(files, config):
    """Adds them, with their pictures."""
    for path in sorted(RESULTS.iterdir()):
        uri = f"results/{path.name}"
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files
