"""`oms sip`: systematic investment plans, so much money into a symbol on a day of every month."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.arguments import parse_day
from cli.completion import complete_symbol
from cli.database import acting, reading
from cli.options import Dsn, Json, RunFilter, RunId
from cli.output import Column, day, moment, money, print_json, print_table, say

__all__ = ["app"]

app = typer.Typer(
    name="sip",
    no_args_is_help=True,
    help="Investment plans: so much money on a day of every month.\n\n"
    "Example: oms sip add --run-id 7f3a --symbol AAPL --amount 500 --day 5",
)

_COLUMNS = (
    Column("RUN", "run_id"),
    Column("NAME", "run_name", spare=1),
    Column("PLAN", "plan"),
    Column("SYMBOL", "symbol"),
    Column("AMOUNT", "amount", money, right=True),
    Column("DAY", "day_of_month", right=True),
    Column("FROM", "start_on", day, spare=2),
    Column("UNTIL", "end_on", day, spare=3),
    Column("STATUS", "status"),
    Column("MISSED", "missed_policy", spare=4),
    Column("EXECUTED", "executed", right=True),
    Column("LAST (UTC)", "last_logical_time", moment),
)

_Plan = Annotated[str, typer.Argument(metavar="PLAN", help="The plan.", show_default=False)]


@app.command()
def add(
    run_id: RunId,
    symbol: Annotated[
        str,
        typer.Option(
            "--symbol",
            metavar="SYMBOL",
            help="What to buy.",
            autocompletion=complete_symbol,
            show_default=False,
        ),
    ],
    amount: Annotated[
        str,
        typer.Option(
            "--amount",
            metavar="MONEY",
            help="Money each time, in the run's currency.",
            show_default=False,
        ),
    ],
    on_day: Annotated[
        int,
        typer.Option("--day", metavar="N", min=1, max=31, help="Day of the month, 1 to 31."),
    ] = 1,
    start: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="DATE", help="First day on which it may be due.", show_default="today"
        ),
    ] = None,
    end: Annotated[
        str | None,
        typer.Option("--until", metavar="DATE", help="Last such day.", show_default=False),
    ] = None,
    missed: Annotated[
        str,
        typer.Option(
            "--missed",
            metavar="POLICY",
            help="What becomes of missed ones: RUN_EACH, RUN_ONCE (the newest) or SKIP.",
        ),
    ] = "RUN_EACH",
    name: Annotated[
        str | None,
        typer.Option(
            "--name", metavar="PLAN", help="The plan's name in its run.", show_default="the symbol"
        ),
    ] = None,
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """Add a plan to a run that hasn't ended.

    It is due once a month, on that day or on the next session of the run's
    calendar; in a shorter month on the last day. The quantity is the money
    divided by the price, cut to the symbol's decimals.

    Example:
      oms sip add --run-id 7f3a --symbol AAPL --amount 500 --day 5
    """
    from engine import reads
    from engine.clock import utc_now
    from engine.market.imports import parse_decimal, parse_symbol
    from engine.reference import Reference
    from engine.sips import Plan, add_plan

    wanted = parse_symbol(symbol)
    plan = Plan(
        plan=name or wanted,
        symbol=wanted,
        amount=parse_decimal(amount, "amount"),
        day_of_month=on_day,
        start_on=parse_day(start, "first day") if start else utc_now().date(),
        end_on=parse_day(end, "last day") if end else None,
        missed_policy=missed.upper().replace("-", "_"),
    )
    with acting(dsn) as conn:
        run = reads.find_run(conn, run_id)
        Reference(conn, run.calendar).quantity_decimals([wanted])
        add_plan(conn, run.user_id, run.run_id, plan)
        (row,) = [row for row in reads.list_plans(conn, run=run) if row.plan == plan.plan]
    if as_json:
        print_json(row)
    else:
        say(
            f"Plan {row.plan} buys {row.symbol} for {money(row.amount)} {run.currency} on day "
            f"{row.day_of_month} of every month from {row.start_on} on."
        )


@app.command("list")
def list_(run_id: RunFilter = None, dsn: Dsn = None, as_json: Json = False) -> None:
    """List plans and how often each was executed.

    Example:
      oms sip list --run-id demo-sip
    """
    from engine import reads

    with reading(dsn) as conn:
        run = reads.find_run(conn, run_id) if run_id else None
        plans = reads.list_plans(conn, run=run)
    if as_json:
        print_json({"plans": plans})
    else:
        print_table(_COLUMNS, plans, empty="There are no such plans; `oms sip add` adds one.")


@app.command()
def pause(plan: _Plan, run_id: RunId, dsn: Dsn = None, as_json: Json = False) -> None:
    """Pause a plan: nothing of it is due until it is resumed.

    Example:
      oms sip pause AAPL --run-id 7f3a
    """
    from engine import reads
    from engine.sips import pause_plan

    with acting(dsn) as conn:
        run = reads.find_run(conn, run_id)
        pause_plan(conn, run.user_id, run.run_id, plan)
    _tell(run_id=str(run.run_id), plan=plan, status="PAUSED", as_json=as_json)


@app.command()
def resume(
    plan: _Plan,
    run_id: RunId,
    start: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="DATE", help="Day from which it may be due.", show_default="today"
        ),
    ] = None,
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """Resume a plan. What was planned during the pause stays undone.

    Example:
      oms sip resume AAPL --run-id 7f3a
    """
    from engine import reads
    from engine.clock import utc_now
    from engine.sips import resume_plan

    on = parse_day(start, "first day") if start else utc_now().date()
    with acting(dsn) as conn:
        run = reads.find_run(conn, run_id)
        resume_plan(conn, run.user_id, run.run_id, plan, on)
    _tell(run_id=str(run.run_id), plan=plan, status="ACTIVE", as_json=as_json)


def _tell(*, run_id: str, plan: str, status: str, as_json: bool) -> None:
    if as_json:
        print_json({"run_id": run_id, "plan": plan, "status": status})
    else:
        say(f"Plan {plan} of run {run_id} is {status}.")
