"""Export a model as one plain folder that anyone can serve, and prove that it answers as it did in training.

    python export.py UUID my-model
    python export.py exp:12 my-model --dtype float32
    python export.py UUID my-model --push_to_hub my-name/my-model

SOURCE is one of

    UUID                  a checkpoint of a local run
    google/gemma-2b       a model on the hub, or a folder
    exp:12, trial:34      on the cluster that DET_MASTER names: the best checkpoint of an experiment or a trial
    ckpt:UUID             a checkpoint of that cluster
    model:NAME            the latest version of a model in that cluster's registry; model:NAME:2 is its version 2

FOLDER is new, or empty. It gets merged weights (of SFT and DPO with LoRA, too), the tokenizer with its chat template, a
generation config with both stop tokens, a model card (README.md) and a Modelfile for Ollama. Before it gets its name,
it is loaded afresh with plain transformers: prompts that the training held out must give the same token ids as in
training, and greedy answers to ten questions must agree with those of the source, whose adapters are not merged. In
float32 all of their tokens must; otherwise the share that does is told. At the end stand the commands that serve it.
"""

import argparse
from pathlib import Path

from errors import CommandLine, exit_on_user_error

DTYPES = ("bfloat16", "float16", "float32")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="the model to export: see above")
    add("folder", metavar="FOLDER", help="where to write it: a new folder, or an empty one")
    add(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        help="of the weights (default: bfloat16, half the size of float32, and what servers compute in; float16 is for"
        " GPUs without bfloat16, and too narrow for Gemma 2 and 3; float32 answers as training's weights, exactly)",
    )
    add(
        "--push_to_hub",
        "--push-to-hub",
        metavar="NAME",
        help="upload the folder to the hub, as NAME or OWNER/NAME: a new repository is private (default: none)",
    )
    add("--device", help="where it is tried: cpu, cuda, cuda:1, mps (default: the best one that is here)")
    return parser.parse_args()


@exit_on_user_error
def main() -> None:
    """Export the model that the command line names."""
    args = parse_arguments()
    # Here and not above: they take seconds to import, and --help or a mistake in an option should not wait for them.
    import transformers
    from rich.console import Console

    from serving.exporting import KEY, Export, export
    from serving.folder import check_folder
    from serving.hub import check_repository, upload
    from trial.context import hide_progress_bars_in_logs
    from trial.models import choose_device, find_model

    console = Console(highlight=False, emoji=False)
    hide_progress_bars_in_logs()
    transformers.utils.logging.set_verbosity_error()  # of a folder that is proven nothing else needs to be said
    folder, hub = Path(args.folder), "--push_to_hub"
    check_folder(folder, "FOLDER")
    device = choose_device(args.device, "--device")
    source = find_model(args.source, KEY)
    repository, public = check_repository(args.push_to_hub, hub) if args.push_to_hub else (None, False)
    if public:
        console.print(f"{hub} {repository}: it is public: anyone can read the model", markup=False, soft_wrap=True)
    name = repository or folder.absolute().name
    commands = export(Export(args.source, source, folder, args.dtype, device, name, console))
    console.print(f"Exported to {folder}. To serve it:", markup=False, soft_wrap=True)
    for server, command in commands:
        console.print(f"  {server}: {command}", markup=False, soft_wrap=True)
    if repository:
        console.print(f"Uploaded to {upload(folder, repository, hub)}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
