"""Draw an experiment as one HTML file: which trial won, by how much, and what to do with it.

    python report.py local_runs/tiny-dpo
    python report.py exp:12 --output grid.html

The first command reads the folder of a local experiment. The second reads the experiment from the Determined master
that the environment variable DET_MASTER names. The file needs no network and no server: open it in a browser, or send
it to someone. It shows the best trial, which others cannot be told apart from it, the commands that compare and serve
its model, what happened, a grid as heatmaps or another search as scatters, every trial's curves, and a table. An
experiment that still runs, or lost some of its trials, is drawn with what there is.
"""

import argparse
from pathlib import Path

from errors import CommandLine, UserError, exit_on_user_error, os_errors_of, shorten


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandLine(__doc__)
    parser.add_argument(
        "experiment", metavar="EXPERIMENT", help="a local experiment's folder, or a cluster's exp:NUMBER"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="default: report.html in that folder, or exp-NUMBER-report.html in this one"
    )
    return parser.parse_args()


@exit_on_user_error
def main() -> None:
    """Write the report of the experiment that the command line names."""
    args = parse_arguments()
    from experiment.results import read_cluster, read_local  # 0.3 s: --help does without
    from storage.files import check_output, write_atomically

    source = args.experiment
    with os_errors_of(shorten(source)):  # a name that is too long, for example
        is_folder = Path(source).is_dir()
    if not (on_cluster := source.startswith("exp:")) and not is_folder:
        raise UserError(f"{source!r} is neither a folder nor exp:NUMBER, an experiment of the cluster")
    output = Path(f"{source.replace(':', '-')}-report.html") if on_cluster else Path(source) / "report.html"
    output = Path(args.output or output)
    if output.suffix != ".html":  # it could be a file of the experiment
        raise UserError(f"--output {output}: must end in .html")
    check_output(output, "--output")
    experiment = read_cluster(source) if on_cluster else read_local(Path(source))
    from experiment.report_page import render  # takes seconds: a mistake is reported before
    from pages.terminal import plural

    page = render(experiment)
    with os_errors_of(f"--output {output}"):
        write_atomically(output, page)
    if experiment.damaged:
        print(f"{source}: {plural(experiment.damaged, 'line')} of trials.jsonl damaged: left out")
    print(f"Report: {output}")


if __name__ == "__main__":
    main()
