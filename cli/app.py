"""The `baton` command: which commands there are. Imports nothing heavy; commands import what they use."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import metadata

from cyclopts import Group

from cli import cluster, process
from cli.config import config
from cli.doctor import doctor
from cli.operator import operator
from cli.planning.plan import plan
from cli.planning.profile import profile
from cli.planning.record import record
from cli.planning.simulate import simulate
from cli.planning.tune import tune
from runtime.process import command_line

# Must be set before the first import of grpc: its fork handlers break the engines' own processes.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")


def version() -> str:
    """The line that names the installed version."""
    try:
        return f"baton {metadata.version('baton-llm')}"
    except metadata.PackageNotFoundError:
        return "baton (not installed)"


def _print_version() -> None:
    """Print the version."""
    print(version())


_CLUSTER = Group.create_ordered("A cluster on this machine")
_ACCOUNTS = Group.create_ordered("Keys and accounts")
_PROCESSES = Group.create_ordered("One process")
_PLANNING = Group.create_ordered("Planning")
_ABOUT = Group.create_ordered("About")

app = command_line.new_app("baton", "Serve language models with separate prefill and decode workers.", version=version)
app.command(cluster.up, group=_CLUSTER)
app.command(cluster.status, group=_CLUSTER)
app.command(cluster.drain, group=_CLUSTER)
app.command(cluster.flip, group=_CLUSTER)
app.command(tune, group=_CLUSTER)
app.command(cluster.restart, group=_CLUSTER)
app.command(cluster.explain, group=_CLUSTER)
app.command(doctor, group=_CLUSTER)
# Imported when it is used: it reads messages of the gRPC API.
app.command(
    "cli.chaos:app", name="chaos", help="Break a cluster under traffic, and check what clients saw.", group=_CLUSTER
)
app.command("cli.kv:app", name="kv", help="Look at KV tiers, and care for what they hold.", group=_CLUSTER)
app.command("cli.accounts:keys", name="keys", help="Make, show, rotate and revoke API keys.", group=_ACCOUNTS)
app.command("cli.usage:usage", name="usage", help="Show what was used and what it cost.", group=_ACCOUNTS)
app.command("cli.usage:prices", name="prices", help="Show prices, or suggest some.", group=_ACCOUNTS)
app.command("cli.usage:limits", name="limits", help="Show what bounds a key.", group=_ACCOUNTS)
app.command("cli.usage:reload", name="reload", help="Read prices, teams and limits again.", group=_ACCOUNTS)
app.command("cli.accounts:audit", name="audit", help="Show what was changed, by whose key.", group=_ACCOUNTS)
app.command(process.scheduler, group=_PROCESSES)
app.command(process.prefill, group=_PROCESSES)
app.command(process.decode, group=_PROCESSES)
app.command(process.front_proxy, group=_PROCESSES)
app.command(operator, group=_PROCESSES)
app.command(process.engine_node, group=_PROCESSES)
app.command(record, group=_PLANNING)
app.command(simulate, group=_PLANNING)
app.command(profile, group=_PLANNING)
app.command(plan, group=_PLANNING)
app.command(
    "cli.experts:app", name="experts", help="Place the experts of MoE models on the ranks of a group.", group=_PLANNING
)
app.command(config, group=_ABOUT)
app.command(_print_version, name="version", group=_ABOUT)
app.register_install_completion_command(group=_ABOUT)


def main(words: Sequence[str] | None = None) -> int:
    """Run one `baton` command and return its exit code."""
    return command_line.run(app, words)
