"""`oms run`: runs are started, looked at, stopped and deleted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.arguments import given_run, parse_assignments, parse_object
from cli.database import acting, owning, reading
from cli.options import Calendar, Dsn, Json, Limit, RunArgument, RunOption, Strategy, UserFilter
from cli.output import (
    Column,
    count,
    day,
    is_terminal,
    moment,
    money,
    number,
    price,
    print_facts,
    print_json,
    print_table,
    say,
    short,
    utc,
)
from cli.output import (
    as_json as to_json,
)

if TYPE_CHECKING:
    from engine.reads import RunDetail, RunRow

__all__ = ["app"]

app = typer.Typer(
    name="run",
    no_args_is_help=True,
    help="Runs: a strategy with its own money and books.\n\n"
    "Example: oms run start --user alice --strategy sip --cash 10000",
)

_COLUMNS = (
    Column("RUN", "run_id"),
    Column("NAME", "name"),
    Column("USER", "user_name", spare=1),
    Column("STRATEGY", "strategy", spare=2),
    Column("STATUS", "status"),
    Column("EQUITY", "equity", money, right=True),
    Column("CASH", "cash", money, right=True, spare=3),
    Column("CURRENCY", "currency", spare=4),
    Column("CALENDAR", "calendar", spare=5),
    Column("LAST TICK (UTC)", "last_logical_time", moment),
)
_POSITIONS = (
    Column("SYMBOL", "symbol"),
    Column("QUANTITY", "quantity", number, right=True),
    Column("AVG COST", "avg_cost", price, right=True),
    Column("MARK", "mark_price", price, right=True),
    Column("MARKET VALUE", "market_value", money, right=True),
    Column("UNREALISED", "unrealized_pnl", money, right=True),
    Column("REALISED", "realized_pnl", money, right=True, spare=1),
)
_PLANS = (
    Column("PLAN", "plan"),
    Column("SYMBOL", "symbol"),
    Column("AMOUNT", "amount", money, right=True),
    Column("DAY", "day_of_month", right=True),
    Column("FROM", "start_on", day),
    Column("STATUS", "status"),
    Column("EXECUTED", "executed", right=True),
)
_EVENTS = (
    Column("#", "seq", right=True),
    Column("TIME (UTC)", "logical_time", moment),
    Column("EVENT", "event_type"),
    Column("SUBJECT", "subject"),
)


@app.command()
def start(
    user: Annotated[
        str,
        typer.Option("--user", metavar="NAME", help="Who owns it.", show_default=False),
    ],
    strategy: Strategy = "sip",
    cash: Annotated[
        str, typer.Option("--cash", metavar="AMOUNT", help="Money that it begins with.")
    ] = "0",
    param: Annotated[
        list[str] | None,
        typer.Option(
            "--param",
            metavar="KEY=VALUE",
            help="A parameter of the strategy; may be repeated.",
            show_default=False,
        ),
    ] = None,
    params: Annotated[
        str | None,
        typer.Option(
            "--params",
            metavar="JSON",
            help="All parameters as one JSON object.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="What to call the run.", show_default=False),
    ] = None,
    calendar: Calendar = "XNYS",
    paper: Annotated[
        str | None,
        typer.Option(
            "--paper",
            metavar="JSON",
            help="The paper broker's settings: slippage, commission, volume share, seed.",
            show_default=False,
        ),
    ] = None,
    account_type: Annotated[
        str,
        typer.Option("--account-type", metavar="TYPE", help="CASH (no debt, no shorts) or MARGIN."),
    ] = "CASH",
    currency: Annotated[
        str, typer.Option("--currency", metavar="CODE", help="The run's currency.")
    ] = "USD",
    tick_at: Annotated[
        str,
        typer.Option(
            "--tick-at", metavar="WHEN", help="OPEN or CLOSE: when the schedule ticks it."
        ),
    ] = "CLOSE",
    account: Annotated[
        list[str] | None,
        typer.Option(
            "--account",
            metavar="NAME",
            help="Trade at this account; repeated: the next where the one before can't be reached.",
            show_default=False,
        ),
    ] = None,
    pnl_method: Annotated[
        str, typer.Option("--pnl-method", metavar="METHOD", help="AVERAGE cost or FIFO.")
    ] = "AVERAGE",
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """Make a run and start it.

    A user has at most one RUNNING run. The strategy and its parameters are
    checked before anything is written. Your own strategy is named by its
    module, installed or in the current folder. A parameter's value is text, or
    JSON where it begins with a brace or a bracket; key.name=value sets one
    name of an object.

    Examples:
      oms run start --user alice --cash 10000
      oms run start --user bob --strategy rebalance --cash 100000 \\
        --param weights.AAPL=0.6 --param weights.IBM=0.4
      oms run start --user carol --strategy my_package.my_module:MyStrategy \\
        --paper '{"commission": {"model": "PERCENT", "percent": "0.1"}}'
    """
    from engine import reads
    from engine.errors import translated
    from engine.market.imports import parse_decimal
    from engine.runs import Terms, create_run, start_run

    terms = Terms(
        strategy=strategy,
        parameters=parse_object(params, "--params") | parse_assignments(param or [], "parameter"),
        initial_cash=parse_decimal(cash, "cash"),
        name=name,
        calendar=calendar,
        paper=parse_object(paper, "--paper"),
        account_type=account_type.upper(),
        currency=currency.upper(),
        tick_at=tick_at.upper(),
        accounts=tuple(account or ()),
        pnl_method=pnl_method.upper(),
    )
    with acting(dsn) as conn:
        user_id = reads.find_user(conn, user).user_id
        with translated(), conn.transaction():
            made = create_run(conn, user_id, terms)
            row = reads.run_row(conn, start_run(conn, user_id, made.run_id))
    if as_json:
        print_json(row)
        return
    say(f"Run {row.run_id} of {user} is {row.status}: {row.strategy}, {_cash(row)}.")
    if row.strategy == "sip":
        say(f"Next: oms sip add --run-id {short(row.run_id)} --symbol AAPL --amount 500 --day 5")
    else:
        say(f"Next: oms tick --run-id {short(row.run_id)}")


@app.command("list")
def list_(
    user: UserFilter = None,
    status: Annotated[
        str | None,
        typer.Option(
            "--status",
            metavar="STATUS",
            help="Only CREATED, RUNNING, STOPPING, STOPPED or ERROR.",
            show_default=False,
        ),
    ] = None,
    limit: Limit = 50,
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """List runs, newest first, with their books at the last tick.

    Examples:
      oms run list
      oms run list --user alice --status running
    """
    from engine import reads

    with reading(dsn) as conn:
        runs = reads.list_runs(conn, user=user, status=status, limit=limit)
    if as_json:
        print_json({"runs": runs})
    else:
        print_table(_COLUMNS, runs, empty="There are no such runs; `oms run start` starts one.")


@app.command()
def show(
    context: typer.Context,
    run: RunArgument = None,
    run_id: RunOption = None,
    events: Annotated[
        int, typer.Option("--events", metavar="N", min=0, help="Newest events to show.")
    ] = 10,
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """Show all about a run: terms, books, plans, health, newest events.

    Examples:
      oms run show demo-sip
      oms run show 7f3a --events 100 --json
    """
    from engine import reads

    named = given_run(run, run_id, context)
    with reading(dsn) as conn:
        detail = reads.run_detail(conn, reads.find_run(conn, named), events_max=events)
    if as_json:
        lists = {"positions": detail.positions, "plans": detail.plans, "events": detail.events}
        print_json(to_json(detail.run) | to_json(detail.health) | lists)
    else:
        _print_detail(detail)


@app.command()
def stop(
    context: typer.Context,
    run: RunArgument = None,
    run_id: RunOption = None,
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """Stop a run for good.

    It waits for a tick that is under way. Pending orders are CANCELED, and
    nothing is written any more; the history stays. A stopped run can't be
    started again.

    Example:
      oms run stop 7f3a
    """
    from engine import reads
    from engine.stop import stop_run

    named = given_run(run, run_id, context)
    with acting(dsn) as conn:
        found = reads.find_run(conn, named)
        row = reads.run_row(conn, stop_run(conn, found.user_id, found.run_id))
    if as_json:
        print_json(row)
    else:
        say(f"Run {row.run_id} is {row.status}; its equity was {money(row.equity)} {row.currency}.")


@app.command()
def delete(
    context: typer.Context,
    run: RunArgument = None,
    run_id: RunOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """Delete a run with everything in it.

    Orders, executions, marks, ledger: this is the only way in which history
    goes. It is the right of the tables' owner, and a RUNNING run must be
    stopped first.

    Example:
      oms run delete 7f3a --yes
    """
    from engine import reads
    from engine.runs import delete_run

    named = given_run(run, run_id, context)
    with owning(dsn) as conn:
        found = reads.find_run(conn, named)
        row = reads.run_row(conn, found)
        if not yes:
            _confirm(row, context)
        delete_run(conn, found.user_id, found.run_id)
    if as_json:
        print_json({"run_id": row.run_id, "deleted": True})
    else:
        say(f"Run {row.run_id} is deleted, with everything in it.")


def _confirm(row: RunRow, context: typer.Context) -> None:
    if not is_terminal():
        raise typer.BadParameter("Nobody is there to be asked; add --yes to delete it", ctx=context)
    name = f" ({row.name})" if row.name else ""
    typer.confirm(f"Delete run {row.run_id}{name} with all of its history?", abort=True)


def _cash(row: RunRow) -> str:
    return f"{money(row.initial_cash)} {row.currency}, calendar {row.calendar}"


def _print_detail(detail: RunDetail) -> None:
    run, health = detail.run, detail.health
    print_facts(
        {
            "Run": str(run.run_id),
            "Name": run.name,
            "User": f"{run.user_name or ''} {run.user_id}".strip(),
            "Status": run.status,
            "Strategy": run.strategy,
            "Parameters": _words(health.parameters),
            "Account": f"{run.account_type} at {run.broker}, calendar {run.calendar}",
            "Ticks at": f"{health.tick_at} of the session",
            "Equity": f"{money(run.equity)} {run.currency}",
            "Cash": _cash_words(detail),
            "Market value": f"{money(run.market_value)} {run.currency}",
            "Orders": _orders_words(health.orders),
            "History": ", ".join(
                [
                    count(health.ticks, "tick"),
                    count(health.executions, "execution"),
                    count(health.events, "event"),
                ]
            ),
            "Last tick": utc(run.last_logical_time),
            "Heartbeat": utc(health.heartbeat_at),
            "Stopped": utc(run.stopped_at),
            "Last error": health.last_error,
        }
    )
    for title, columns, rows in (
        ("Positions", _POSITIONS, [p for p in detail.positions if p.quantity]),
        ("Plans", _PLANS, detail.plans),
        ("Newest events", _EVENTS, detail.events),
    ):
        if rows:
            say()
            say(title, style="bold")
            print_table(columns, rows, empty="")


def _cash_words(detail: RunDetail) -> str:
    run = detail.run
    words = f"{money(run.cash)} of {money(run.initial_cash)} {run.currency}"
    reserved = detail.health.reserved_cash
    return f"{words}, {money(reserved)} reserved by open orders" if reserved else words


def _orders_words(orders: Mapping[str, int]) -> str:
    return ", ".join(f"{many:,} {status}" for status, many in sorted(orders.items())) or "none"


def _words(value: Any) -> str | None:
    """Parameters in one line; none at all is nothing to say."""
    if isinstance(value, Mapping):
        inner = ", ".join(f"{key} {_words(item)}" for key, item in value.items())
        return inner or None
    return str(value)
