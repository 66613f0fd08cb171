"""The command line. Importing this module imports no numeric library: every command loads what it needs."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Optional

import click
import typer
import typer.core

from dpguard.cli import records
from dpguard.cli.folder import Folder
from dpguard.errors import UserError

# plain help: with rich at hand typer escapes the brackets of its own "[default: ...]", and then prints the escapes
typer.core.HAS_RICH = False

app = typer.Typer(
    name="dpguard",
    help="What may a federated client share, what does that leak, what does it cost?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(records.app, name="records")

Out = Annotated[Optional[Path], typer.Option("--out", help="Folder of records and report.")]  # noqa: UP045
MOST_SEED = 2**32 - 1
Seed = Annotated[int, typer.Option("--seed", min=0, max=MOST_SEED, help="Seed of everything random.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Model = Annotated[
    str, typer.Option("--model", help="demo, minilm, a local folder, or a hub name; +lora8 after it: with LoRA.")
]
Targets = Annotated[int, typer.Option("--targets", min=1, help="Messages to attack.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Texts in one message.")]


@app.command()
def run(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="Study file (YAML).")],
    out: Out = None,
    workers: Annotated[Optional[int], typer.Option("--workers", help="Processes side by side [all cores].")] = None,  # noqa: UP045
    threads: Annotated[int, typer.Option("--threads", min=1, help="Of each process.")] = 1,
    devices: Annotated[
        str, typer.Option("--devices", metavar="LIST", help="GPUs that train: none, auto, or such as 0,1.")
    ] = "none",
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed cells again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the grid, its epsilons and an estimate.")] = False,
    show_text: Annotated[
        bool, typer.Option("--show-text", help="Print the users' private sentences in the report.")
    ] = False,
    shard: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--shard", metavar="I/N", help="Run part I of N, from 0/N on; see dpguard merge."),
    ] = None,
    only: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--only", metavar="POLICY", help="Just this policy and the control, into --out; may be repeated."),
    ] = None,
    reuse: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option("--reuse", metavar="DIR", help="Take the same cells' answers from here; may be repeated."),
    ] = None,
    ray: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--ray", metavar="ADDRESS", help="Run on this Ray cluster: host:port, ray://host:port or auto."),
    ] = None,
) -> None:
    """Run a study; running it again does only what is missing."""
    from dpguard.cli.studies import Asked, run_study

    asked = Asked(
        out=out, workers=workers, threads=threads, dry_run=dry_run, retry_failed=retry_failed, show_text=show_text,
        shard=shard, only=only or (), reuse=reuse or (), ray=ray, devices=devices,
    )  # fmt: skip
    raise typer.Exit(run_study(study, asked))


@app.command()
def status(folder: Folder, as_json: Json = False) -> None:
    """Say what a study is doing, from any shell: counts, running cells, time remaining, failed cells."""
    from dpguard.cli.watching import print_status

    print_status(folder, as_json=as_json)


@app.command()
def show(
    folder: Folder,
    cell: Annotated[list[str], typer.Argument(metavar="CELL", help="The start of its id, or words: a policy, failed.")],
    as_json: Json = False,
) -> None:
    """Show what one cell left: its record, and its error with traceback and output."""
    from dpguard.cli.watching import print_cell

    print_cell(folder, cell, as_json=as_json)


@app.command()
def cache(
    folder: Folder,
    clear: Annotated[bool, typer.Option("--clear", help="Drop it all; what is needed is made again.")] = False,
    size: Annotated[bool, typer.Option("--size", help="Print its bytes, nothing else.")] = False,
) -> None:
    """Show what a study keeps of work that its cells share."""
    from dpguard.cli.watching import print_cache

    print_cache(folder, clear=clear, size=size)


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the merged records, new or of the same study.")],
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of the study's shards.")],
) -> None:
    """Merge the records of a study that ran in shards, and report on them."""
    from dpguard.cli.studies import merge_shards

    raise typer.Exit(merge_shards(out, folders))


@app.command()
def report(
    folder: Folder,
    metric: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--metric", help="Leakage metric [the study's]: dpguard list metrics."),
    ] = None,
    pdf: Annotated[bool, typer.Option("--pdf", help="Print report.pdf as well (needs Chromium).")] = False,
    show_text: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--show-text/--hide-text", help="Users' private sentences in the report [as the study was run]."),
    ] = None,
    out: Annotated[Optional[Path], typer.Option("--out", help="Folder of the report [DIR].")] = None,  # noqa: UP045
) -> None:
    """Render the report of a folder of records again."""
    from dpguard.cli.reporting import render_report

    render_report(folder, metric=metric, pdf=pdf, show_text=show_text, out=out)


@app.command()
def card(
    folder: Folder,
    policy: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--policy", help="A policy of the study [the recommended one]."),
    ] = None,
    out: Annotated[Optional[Path], typer.Option("--out", help="Folder of the card [DIR/cards/POLICY].")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Write a policy's privacy card, to be attached to a model card: card.md and card.json."""
    from dpguard.cli.reporting import write_card

    write_card(folder, policy, out, as_json=as_json)


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR DIR...", help="Folders of two or more studies.")],
    out: Annotated[Optional[Path], typer.Option("--out", help="File to write: compare.html or compare.md.")] = None,  # noqa: UP045
) -> None:
    """Put studies side by side: what differs between them, then the same policies."""
    from dpguard.cli.reporting import compare_studies

    compare_studies(folders, out)


@app.command()
def recommend(
    folder: Folder,
    max_leakage: Annotated[Optional[float], typer.Option("--max-leakage", min=0, max=1)] = None,  # noqa: UP045
    min_utility: Annotated[Optional[float], typer.Option("--min-utility")] = None,  # noqa: UP045
    max_epsilon: Annotated[Optional[float], typer.Option("--max-epsilon", min=0)] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Pick the policy of highest utility under caps.

    A cap that is not given is the study's; --max-leakage 1, --min-utility -1 or --max-epsilon inf lifts one.
    """
    from dpguard.cli.reporting import print_recommendation

    print_recommendation(
        folder, max_leakage=max_leakage, min_utility=min_utility, max_epsilon=max_epsilon, as_json=as_json
    )


@app.command()
def attack(
    policy: Annotated[str, typer.Option("--policy", help="A policy file, a ready-made name, or a selector.")] = "none",
    model: Model = "demo",
    data: Annotated[str, typer.Option("--data", help="demo, a jsonl, csv or parquet file, or a hub name.")] = "demo",
    targets: Targets = 3,
    batch_size: BatchSize = 1,
    seed: Seed = 0,
    attacks: Annotated[
        Optional[list[str]], typer.Option("--attack", help="Only this attack, e.g. span or match:partial (repeatable).")  # noqa: UP045
    ] = None,
    know: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--know", help="The server knows it: count [default], labels, lengths (repeatable), or nothing."),
    ] = None,
    candidates: Annotated[
        int,
        typer.Option("--candidates", min=0, help="The server knows that the text is one of so many; 0: no such list."),
    ] = 0,
    mode: Annotated[str, typer.Option("--mode", help="eval, or train: the client runs with dropout.")] = "eval",
    local_steps: Annotated[
        int, typer.Option("--local-steps", min=0, help="0: a gradient is sent; else the update after so many steps.")
    ] = 0,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Of the local steps (SGD).")] = 1e-3,
    clients: Annotated[int, typer.Option("--clients", min=1, help="The server sees the mean of so many.")] = 1,
    text: Annotated[str, typer.Option("--text", help="Column of the texts.")] = "text",
    label: Annotated[str, typer.Option("--label", help="Column of the labels.")] = "label",
    as_json: Json = False,
) -> None:
    """Show what one policy gives away: true text beside recovered text.

    The model's weights are attacked as they are. For first and trained weights side by side, write a study with
    leakage: {at: [start, end]}.
    """
    from dpguard.cli.look import attack_once, knowledge
    from dpguard.measure.threat import Threat

    threat = Threat(knowledge(know), mode, local_steps, learning_rate, clients, candidates)
    attack_once(
        policy, model, data, targets=targets, batch_size=batch_size, seed=seed, attacks=attacks, threat=threat,
        text=text, label=label, as_json=as_json,
    )  # fmt: skip


@app.command()
def guarantee(
    policy: Annotated[str, typer.Argument(metavar="POLICY", help="A policy file, a ready-made name, or a selector.")],
    sampling_rate: Annotated[float, typer.Option("--sampling-rate", help="Batch size / number of examples.")],
    steps: Annotated[int, typer.Option("--steps", help="Messages that the client sends.")],
    delta: Annotated[float, typer.Option("--delta", help="At most 1 / number of examples.")] = 1e-5,
    model: Model = "demo",
    examples: Annotated[Optional[int], typer.Option("--examples", help="Number of examples, to check delta.")] = None,  # noqa: UP045
    shuffle: Annotated[bool, typer.Option("--shuffle", help="Shuffled fixed batches instead of Poisson.")] = False,
    kappa: Annotated[float, typer.Option("--kappa", help="Chance of success without the message.")] = 0.01,
    target_epsilon: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--target-epsilon", help="Calibrate the noise to it."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a policy guarantees: epsilon, what is covered and what is not, the reconstruction bound."""
    from dpguard.cli.claims import print_guarantee

    print_guarantee(
        policy, model, sampling_rate=sampling_rate, steps=steps, delta=delta, examples=examples,
        shuffle=shuffle, kappa=kappa, as_json=as_json, target_epsilon=target_epsilon,
    )  # fmt: skip


@app.command()
def audit(
    policy: Annotated[str, typer.Argument(metavar="POLICY", help="A policy file, a ready-made name, or a selector.")],
    model: Annotated[
        Optional[str], typer.Option("--model", help="Send real texts through this model as well [no].")  # noqa: UP045
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Public batch size, the divisor.")] = 8,
    seed: Seed = 0,
    thorough: Annotated[bool, typer.Option("--thorough", help="Add the slow two-world test.")] = False,
    as_json: Json = False,
) -> None:
    """Check that what a policy sends obeys its claims: sensitivity, noise, release, sampling, epsilon."""
    from dpguard.cli.audit import print_audit

    status = print_audit(policy, model, batch_size=batch_size, seed=seed, thorough=thorough, as_json=as_json)
    raise typer.Exit(status)


@app.command("fit-clips")
def fit_clips(
    policy: Annotated[str, typer.Argument(metavar="POLICY", help="A policy file, a ready-made name, or a selector.")],
    model: Model = "demo",
    data: Annotated[
        str,
        typer.Option("--data", help="PUBLIC texts: demo (its public part), a jsonl, csv or parquet file, a hub name."),
    ] = "demo",
    text: Annotated[str, typer.Option("--text", help="Column of the texts.")] = "text",
    label: Annotated[str, typer.Option("--label", help="Column of the labels.")] = "label",
    quantile: Annotated[float, typer.Option("--quantile", help="Fraction of the texts that is not clipped.")] = 0.5,
    examples: Annotated[int, typer.Option("--examples", min=1, help="Texts to measure.")] = 256,
    out: Annotated[Optional[Path], typer.Option("--out", help="Policy file to write [print it].")] = None,  # noqa: UP045
    seed: Annotated[int, typer.Option("--seed", min=0, max=MOST_SEED, help="Seed of the choice of texts.")] = 0,
    as_json: Json = False,
) -> None:
    """Fit a policy's clips to the gradients of public texts, group by group."""
    from dpguard.cli.fitting import fit_clips as run_fit

    run_fit(
        policy, model, data,
        text=text, label=label, quantile=quantile, examples=examples, out=out, seed=seed, as_json=as_json,
    )  # fmt: skip


@app.command()
def export(
    folder: Folder,
    to: Annotated[str, typer.Option("--to", help="opacus, flower or nvflare.")],
    policy: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--policy", help="A policy of the study [the recommended one]."),
    ] = None,
    out: Annotated[Optional[Path], typer.Option("--out", help="Folder to make [DIR/export/FRAMEWORK].")] = None,  # noqa: UP045
    allow_metric: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--allow-metric", help="Clients may send this number, past clip and noise (repeatable)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a policy as a project that can be run: its table, a privacy card, a self-test."""
    from dpguard.cli.shipping import export_policy

    export_policy(folder, to, policy=policy, out=out, metrics=allow_metric or [], as_json=as_json)


@app.command()
def layers(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="demo, minilm, a local folder, or a hub name; +lora8 after it: with LoRA."
        ),
    ],
    as_json: Json = False,
) -> None:
    """Show a model's blocks and roles with their share of parameters."""
    from dpguard.cli.claims import print_layers

    print_layers(model, as_json=as_json)


@app.command("list")
def list_names(
    what: Annotated[str, typer.Argument(metavar="policies|attacks|metrics|studies|families|columns|keys")],
    as_json: Json = False,
) -> None:
    """List what can be named."""
    from dpguard.cli.listing import print_names

    print_names(what, as_json=as_json)


@app.command()
def doctor() -> None:
    """Check this installation: versions, extras, hub, bundled model, a first private step."""
    from dpguard.cli.doctor import examine

    raise typer.Exit(examine())


INSTEAD = dict.fromkeys(("check", "dry-run", "plan", "validate"), "dpguard run STUDY --dry-run")
"""What somebody wants who writes a word that is no command, where it is not the one spelt most alike."""


def main() -> None:
    """Run the command line; a user's mistake is one sentence on stderr and exit status 2."""
    command = typer.main.get_command(app)
    try:
        status = command.main(standalone_mode=False)
    except UserError as error:
        print(f"dpguard: {error}", file=sys.stderr)
        status = 2
    except click.ClickException as error:
        # typer would print a framed usage text; one sentence says it
        # typer and click each add the nearest name
        said = re.sub(r"( Did you mean [^?]*\?)\1+$", r"\1", error.format_message())
        word = re.match(r"No such command '([^']*)'\.", said)
        if word and word[1] in INSTEAD:
            said = f"{word[0]} Did you mean '{INSTEAD[word[1]]}'?"
        print(f"dpguard: {said}", file=sys.stderr)
        status = 2
    except (click.Abort, KeyboardInterrupt):
        print("dpguard: stopped", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader (head, less) went away: no traceback for that
        status = 141
    sys.exit(status if isinstance(status, int) else 0)
