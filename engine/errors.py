"""What can go wrong, as types.

EngineError
├── BadInput               what came from outside can't be used; nothing was written
├── ConfigurationError     the machine, the server or a setting isn't as it must be
├── StrategyFailed         a strategy raised, or asked for what can't be; the run is in ERROR
├── DatabaseUnavailable    the connection is gone; whether a COMMIT took effect is unknown
├── Retryable              deadlock, lock or statement timeout, ...: run the unit again
└── RuleViolation          the database refused a write that would break the books
    ├── RunNotRunning          the run is not RUNNING
    ├── RunAlreadyRunning      the user already has a RUNNING run
    ├── IllegalRunMove         no such move of a run's status
    ├── IllegalOrderMove       no such move of an order's status
    ├── OrderNotOpen           a trade on an order that can't trade any more
    ├── NotOurNumber           a number that the database computes was written by hand
    ├── BooksDisagree          a number contradicts the rows that it follows from
    ├── ChainBroken            a ledger row that doesn't follow from the one before it
    ├── TimeMovesForward       a logical time before the run's last one
    ├── HistoryIsFixed         history was to be edited
    ├── LeaseHeld              another connector holds the account
    ├── LeaseLost              the connector doesn't hold the account, or not any more
    ├── AlreadyHappened        it is in the ledger already
    ├── UnknownReference       a row names another that doesn't exist
    └── InvalidValue           a value that no row may hold

The database says which rule it was by SQLSTATE and constraint name; RULES turns that into a type.
The few rules that Postgres enforces without a name (a generated column, a missing value, a view's
check) are named here, ``<table>_<what must hold>`` like the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import psycopg


class EngineError(Exception):
    """Everything that this project raises on purpose."""


class BadInput(EngineError):
    """What came from outside can't be used; nothing was written."""


class ConfigurationError(EngineError):
    """The machine, the server or a setting isn't as it must be."""


class StrategyFailed(EngineError):
    """A strategy raised, or asked for what can't be; its run is in ERROR."""


class DatabaseUnavailable(EngineError):
    """The connection is gone; whether a COMMIT took effect is unknown: ask with the same key."""


class Retryable(EngineError):
    """Serialization failure, deadlock, lock or statement timeout: run the whole unit again."""


class RuleViolation(EngineError):
    """The database refused a write that would break the books.

    ``constraint`` is the rule's stable name, ``sqlstate`` its code, ``hint`` what to do.
    """

    def __init__(self, message: str, constraint: str, sqlstate: str, hint: str) -> None:
        super().__init__(f"{message}. {hint}" if hint else message)
        self.constraint = constraint
        self.sqlstate = sqlstate
        self.hint = hint


class RunNotRunning(RuleViolation):
    """The run is not RUNNING."""


class RunAlreadyRunning(RuleViolation):
    """The user already has a RUNNING run."""


class IllegalRunMove(RuleViolation):
    """No such move of a run's status."""


class IllegalOrderMove(RuleViolation):
    """No such move of an order's status."""


class OrderNotOpen(RuleViolation):
    """A trade on an order that can't trade any more."""


class NotOurNumber(RuleViolation):
    """A number that the database computes was written by hand."""


class BooksDisagree(RuleViolation):
    """A number contradicts the rows that it follows from."""


class ChainBroken(RuleViolation):
    """A ledger row that doesn't follow from the one before it."""


class TimeMovesForward(RuleViolation):
    """A logical time before the run's last one."""


class HistoryIsFixed(RuleViolation):
    """History was to be edited."""


class LeaseHeld(RuleViolation):
    """Another connector holds the account."""


class LeaseLost(RuleViolation):
    """The connector doesn't hold the account, or not any more."""


class AlreadyHappened(RuleViolation):
    """It is in the ledger already."""


class UnknownReference(RuleViolation):
    """A row names another that doesn't exist."""


class InvalidValue(RuleViolation):
    """A value that no row may hold."""


class Rule(NamedTuple):
    """What a constraint's violation is, and a hint where the database gives none."""

    kind: type[RuleViolation]
    hint: str = ""


# Our own SQLSTATEs carry the meaning; they are told apart before any constraint's name.
SQLSTATES: dict[str, type[RuleViolation]] = {
    "23T01": IllegalOrderMove,
    "23T02": IllegalRunMove,
    "23T03": RunNotRunning,
    "23T04": NotOurNumber,
    "23T05": OrderNotOpen,
    "23T06": ChainBroken,
    "23T07": TimeMovesForward,
    "23T08": BooksDisagree,
    "23T09": HistoryIsFixed,
    "23T20": LeaseHeld,
    "23T21": LeaseLost,
}

_TEXT = "Use the format that the message names."
_SHORT = "Names have at most 100 characters, ids 128, subjects 200."
_TIME = "Use a time of the years 1 to 9999."
_RANGE = "Quantities and prices have at most 8 decimals and stay below 10^15."
_WORD = "Use one of the words that the schema lists."
_ROW = "Write the row that it names first."
_USER = "There is no such user; `oms user add` adds one."
_RUN = "The user has no such run; `oms run list` shows them."
_ACCOUNT = "The user has no such account; `oms account list` shows them."
_SYMBOL = "A symbol is 32 capital letters, digits and . _ = ^ / - at most."

# Constraints that Postgres itself enforces. A test compares this with the catalog.
RULES: dict[str, Rule] = {
    "strategy_run_one_running_per_user": Rule(RunAlreadyRunning, "Stop the running one first."),
    "event_ledger_once_per_logical_time": Rule(AlreadyHappened, "Nothing needs to be written."),
    "event_ledger_occasion_once": Rule(AlreadyHappened, "Nothing needs to be written."),
    "event_ledger_run_ends_once": Rule(AlreadyHappened, "Nothing needs to be written."),
    "event_ledger_tick_has_no_subject": Rule(InvalidValue, "Leave the subject of a TICK out."),
    "mtm_ledger_one_per_logical_time": Rule(AlreadyHappened, "Nothing needs to be written."),
    "alert_once_until_acknowledged": Rule(AlreadyHappened, "Acknowledge the open one first."),
    "broker_command_submit_once": Rule(AlreadyHappened, "It is on its way; ask for a SNAPSHOT."),
    "broker_command_once_a_version": Rule(AlreadyHappened, "It is on its way already."),
    "execution_reversed_once": Rule(AlreadyHappened, "It is taken back already."),
    "orders_id_once_at_brokers": Rule(AlreadyHappened, "Give every order an id of its own."),
    "run_route_account_once": Rule(AlreadyHappened, "The run has a route to it already."),
    "orders_client_order_id_once": Rule(AlreadyHappened, "Use a new client_order_id."),
    "orders_not_overfilled_on_paper": Rule(OrderNotOpen, "Trade at most what is left of it."),
    "orders_status_agrees_with_fills": Rule(BooksDisagree, "Executions move an order."),
    "strategy_run_cash_not_negative_in_cash_account": Rule(
        BooksDisagree, "Spend at most the cash, or use a MARGIN account."
    ),
    "trading_halt_open_once": Rule(AlreadyHappened, "Place it under another name."),
    "system_halt_open_once": Rule(AlreadyHappened, "Place it under another name."),
    "flatten_request_one_at_a_time": Rule(AlreadyHappened, "Wait until the running one is done."),
    "circuit_breaker_kind_once": Rule(AlreadyHappened, "Change the row that is there."),
    "limit_kind_place_once": Rule(AlreadyHappened, "Give it a place of its own."),
    "execution_price_positive": Rule(InvalidValue),
    "execution_commission_in_run_currency": Rule(InvalidValue),
    "execution_commission_cost_follows": Rule(
        NotOurNumber, "Leave rate and cost out; the database computes them."
    ),
    "orders_account_unless_paper": Rule(
        InvalidValue, "Leave broker out; only an order of a run at a broker is at one."
    ),
    "broker_account_account_format": Rule(
        InvalidValue,
        "A name is up to 64 letters, digits, dots, dashes and underscores, none of . - _ first.",
    ),
    "broker_account_broker_format": Rule(
        InvalidValue, "Name the kind in lower case, as dummy; paper has no accounts."
    ),
    "broker_account_currency_format": Rule(
        InvalidValue, "A currency is three capital letters, as USD."
    ),
    "broker_account_time_zone_known": Rule(
        InvalidValue, "Name a zone of the IANA database, as Europe/Berlin."
    ),
    "broker_account_opening_cash_in_range": Rule(
        InvalidValue, "Cash has at most 8 decimals and stays below 10^18."
    ),
    "broker_account_rates_positive": Rule(
        InvalidValue, "Let it send 1 to 10000 new orders, and 1 to 10000 messages, in a second."
    ),
    "broker_account_seconds_positive": Rule(
        InvalidValue,
        "heartbeat_seconds is 1 to 86400 (a day), stale_seconds 1 to 864000 (ten days).",
    ),
    "broker_account_out_of_session_known": Rule(InvalidValue, "Use QUEUE or REFUSE."),
    "broker_account_hours_whole": Rule(
        InvalidValue, "Give the hours' begin and end, which differ, or neither of them."
    ),
    "broker_account_settings_is_object": Rule(
        InvalidValue, 'Give the settings as a JSON object, as {"port": 7500}.'
    ),
    "broker_account_belongs_to_user": Rule(UnknownReference, _USER),
    "run_route_preference_positive": Rule(
        InvalidValue, "The preferred account has preference 1, the last one at most 100."
    ),
    "run_route_belongs_to_run": Rule(UnknownReference, _RUN),
    "run_route_to_account": Rule(UnknownReference, _ACCOUNT),
    "risk_limit_symbol_format": Rule(InvalidValue, _SYMBOL),
    "risk_limit_kind_known": Rule(InvalidValue, "The table limit_kind lists the kinds of limits."),
    "risk_limit_has_what_its_kind_needs": Rule(
        InvalidValue,
        "Most kinds need a value, 0 or more; ..._SYMBOL a symbol alone; WASH_TRADE and "
        "TRADING_HOURS no value.",
    ),
    "risk_limit_window_in_range": Rule(
        InvalidValue,
        "ORDER_RATE_MAX needs a window of up to 86400 seconds, DUPLICATE_INTENT has its value "
        "for one, no other kind has any.",
    ),
    "risk_limit_days_in_range": Rule(
        InvalidValue, "Only RESTRICTED_SYMBOL has days; the first is not after the last."
    ),
    "risk_limit_of_account": Rule(UnknownReference, _ACCOUNT),
    "risk_limit_belongs_to_run": Rule(UnknownReference, _RUN),
    "risk_limit_belongs_to_user": Rule(UnknownReference, _USER),
    "circuit_breaker_kind_known": Rule(
        InvalidValue, "The table breaker_kind lists the kinds of breakers."
    ),
    "circuit_breaker_threshold_in_range": Rule(
        InvalidValue,
        "A threshold is 0 or more, below 10^20, in its kind's unit; without one it is off.",
    ),
    "circuit_breaker_seconds_in_range": Rule(InvalidValue, "A window is 1 to 86400 seconds."),
    "circuit_breaker_heartbeat_of_account": Rule(
        InvalidValue, "How long a broker may be silent is heartbeat_seconds of its account."
    ),
    "circuit_breaker_of_account": Rule(UnknownReference, _ACCOUNT),
    "circuit_breaker_belongs_to_user": Rule(UnknownReference, _USER),
    "trading_halt_of_account": Rule(UnknownReference, _ACCOUNT),
    "trading_halt_of_run": Rule(UnknownReference, _RUN),
    "trading_halt_belongs_to_user": Rule(UnknownReference, _USER),
    "flatten_request_of_account": Rule(UnknownReference, _ACCOUNT),
    "flatten_request_of_run": Rule(UnknownReference, _RUN),
    "flatten_request_belongs_to_user": Rule(UnknownReference, _USER),
    "orders_to_account": Rule(UnknownReference, _ACCOUNT),
    **dict.fromkeys(
        (
            "alert_code_format",
            "app_user_name_printable",
            "reconciliation_why_format",
            "broker_event_kind_format",
            "execution_commission_known_currency",
            "system_halt_name_format",
            "trading_halt_name_format",
            "event_ledger_event_type_format",
            "fx_rate_currencies_format",
            "execution_commission_currency_format",
            "instrument_currency_format",
            "instrument_symbol_format",
            "orders_symbol_format",
            "position_symbol_format",
            "sip_plan_plan_format",
            "strategy_run_currency_format",
            "strategy_run_broker_format",
        ),
        Rule(InvalidValue, _TEXT),
    ),
    **dict.fromkeys(
        (
            "alert_words_short",
            "reconciliation_difference_words_short",
            "broker_lease_holder_name_short",
            "event_ledger_subject_short",
            "flatten_request_words_short",
            "system_halt_words_short",
            "trading_halt_words_short",
            "execution_execution_id_format",
            "orders_client_order_id_short",
            "strategy_run_words_short",
            "broker_lease_holder_name_short",
        ),
        Rule(InvalidValue, _SHORT),
    ),
    **dict.fromkeys(
        (
            "broker_event_event_at_in_range",
            "calendar_session_times_in_range",
            "equity_peak_as_of_in_range",
            "corporate_action_ex_date_in_range",
            "engine_status_times_in_range",
            "execution_commission_event_at_in_range",
            "event_ledger_logical_time_in_range",
            "execution_event_at_in_range",
            "fx_rate_at_in_range",
            "mtm_ledger_logical_time_in_range",
            "orders_times_in_range",
            "position_marked_at_in_range",
            "price_bar_times_in_range",
            "sip_plan_days_in_range",
        ),
        Rule(InvalidValue, _TIME),
    ),
    **dict.fromkeys(
        (
            "broker_event_number_positive",
            "reconciliation_counts_not_negative",
            "corporate_action_ratio_positive",
            "breaker_kind_threshold_in_range",
            "equity_peak_equity_in_range",
            "open_order_sum_amount_in_range",
            "open_order_sum_bucket_in_range",
            "engine_status_lag_in_range",
            "execution_commission_amount_in_range",
            "execution_commission_in_range",
            "execution_commission_rate_positive",
            "execution_price_in_range",
            "execution_quantity_positive",
            "fx_rate_rate_positive",
            "instrument_quantity_decimals_in_range",
            "orders_filled_quantity_not_negative",
            "orders_prices_in_range",
            "orders_quantity_in_range",
            "orders_quantity_positive_unless_rejected",
            "orders_trail_in_range",
            "orders_trail_positive_unless_rejected",
            "position_mark_price_in_range",
            "position_quantity_in_range",
            "price_bar_high_is_highest",
            "price_bar_low_is_lowest",
            "price_bar_prices_finite",
            "price_bar_prices_of_8_decimals",
            "price_bar_volume_not_negative",
            "sip_plan_amount_positive",
            "sip_plan_day_of_month_in_range",
            "strategy_run_cash_in_range",
            "strategy_run_initial_cash_in_range",
            "event_ledger_seq_positive",
            "event_ledger_hash_is_sha256",
        ),
        Rule(InvalidValue, _RANGE),
    ),
    **dict.fromkeys(
        (
            "app_user_kind_known",
            "reconciliation_difference_action_known",
            "reconciliation_difference_class_known",
            "broker_command_kind_known",
            "broker_command_outcome_known",
            "broker_command_priority_known",
            "broker_event_finding_known",
            "broker_event_priority_known",
            "flatten_request_scope_known",
            "flatten_request_status_known",
            "system_halt_state_known",
            "trading_halt_scope_known",
            "trading_halt_state_known",
            "corporate_action_kind_known",
            "open_order_sum_kind_known",
            "orders_order_type_known",
            "orders_purpose_known",
            "orders_side_known",
            "orders_time_in_force_known",
            "sip_plan_missed_policy_known",
            "sip_plan_status_known",
            "strategy_run_account_type_known",
            "strategy_run_pnl_method_known",
            "strategy_run_status_known",
            "strategy_run_tick_at_known",
        ),
        Rule(InvalidValue, _WORD),
    ),
    **dict.fromkeys(
        (
            "alert_acknowledged_by_somebody",
            "broker_command_claimed_before_sent",
            "broker_command_done_has_outcome",
            "broker_command_names_its_order",
            "broker_command_payload_is_object",
            "broker_command_sent_has_time",
            "broker_command_withdrawn_unclaimed",
            "broker_event_applied_has_finding",
            "broker_event_payload_is_object",
            "calendar_session_open_before_close",
            "flatten_request_finished_has_summary",
            "flatten_request_names_its_scope",
            "flatten_request_summary_is_object",
            "system_halt_lifted_by_somebody",
            "trading_halt_lifted_by_somebody",
            "trading_halt_names_its_scope",
            "engine_state_state_is_object",
            "engine_status_error_has_time",
            "event_ledger_payload_is_object",
            "fx_rate_of_two_currencies",
            "open_order_sum_amount_if_known",
            "open_order_sum_symbol_unless_cash",
            "order_broker_id_names_something",
            "orders_reject_has_source_and_code",
            "orders_status_after_birth",
            "position_holding_has_mark",
            "position_mark_has_time",
            "price_bar_starts_before_it_ends",
            "sip_plan_ends_after_it_starts",
            "strategy_run_paper_is_object",
            "strategy_run_parameters_is_object",
            "strategy_run_stopped_at_iff_over",
            "broker_command_withdrawn_unclaimed",
        ),
        Rule(InvalidValue, "The row's values don't fit together."),
    ),
    **dict.fromkeys(
        (
            "alert_belongs_to_user",
            "broker_command_belongs_to_run",
            "broker_command_of_account",
            "reconciliation_difference_of_reconciliation",
            "reconciliation_of_account",
            "broker_command_of_order",
            "broker_event_of_account",
            "broker_lease_of_account",
            "corporate_action_symbol_known",
            "equity_peak_belongs_to_run",
            "engine_state_belongs_to_run",
            "engine_status_belongs_to_run",
            "event_ledger_belongs_to_run",
            "execution_belongs_to_order",
            "execution_belongs_to_run",
            "execution_commission_belongs_to_run",
            "execution_commission_has_rate",
            "execution_commission_of_execution",
            "mtm_ledger_belongs_to_run",
            "open_order_sum_belongs_to_run",
            "order_broker_id_of_account",
            "order_broker_id_of_order",
            "order_is_of_run",
            "order_transition_from_known",
            "order_transition_to_known",
            "orders_account_is_routed",
            "orders_belongs_to_run",
            "position_belongs_to_run",
            "price_bar_symbol_known",
            "run_transition_from_known",
            "run_transition_to_known",
            "sip_plan_belongs_to_run",
            "sip_plan_symbol_known",
            "split_applied_belongs_to_run",
            "split_applied_is_announced",
            "strategy_run_belongs_to_user",
            "broker_lease_of_account",
        ),
        Rule(UnknownReference, _ROW),
    ),
}

_CHECK_VIOLATION = "23514"
# What Postgres computes by itself. It refuses a value for them before any constraint of ours is
# asked, and its message names the column only.
GENERATED: dict[str, str] = {
    "equity": "mtm_ledger",
    "avg_fill_price": "orders",
    "reserved_cash": "orders",
    "avg_cost": "position",
    "market_value": "position",
}

# The views that show paper runs only, and take rows of them only.
PAPER_VIEWS = ("paper_order", "paper_trade", "paper_position", "paper_equity_curve")

_RETRYABLE = ("40001", "40P01", "55P03", "57014")


def typed(error: psycopg.Error) -> EngineError | None:
    """The typed error that a database error stands for; ``None`` where it is a bug of ours."""
    state, diag = error.sqlstate, error.diag
    if state is None or state[:2] == "08" or state[:4] == "57P0":
        return DatabaseUnavailable(f"the database went away: {error}".strip())
    if state == "25006":
        return DatabaseUnavailable(f"the database takes no writes: {diag.message_primary}")
    if state in _RETRYABLE:
        return Retryable(f"{diag.message_primary}; run it again")
    if state == "42501":
        return ConfigurationError(f"{diag.message_primary}; connect as a role that may do this")
    if state[:2] == "22":
        return BadInput(f"the database can't take a value: {diag.message_primary}")
    return _violation(error, state) or _unnamed(error, state)


def _violation(error: psycopg.Error, state: str) -> RuleViolation | None:
    """What a constraint's name, or one of our SQLSTATEs, says."""
    diag = error.diag
    name = diag.constraint_name or ""
    if state in SQLSTATES:
        return SQLSTATES[state](diag.message_primary or "", name, state, diag.message_hint or "")
    if name in RULES:
        rule = RULES[name]
        # The detail of a CHECK is the whole row, which buries what is wrong with it.
        detail = "" if state == _CHECK_VIOLATION else diag.message_detail or ""
        message = f"{diag.message_primary} {detail}".strip().rstrip(".")
        return rule.kind(message, name, state, diag.message_hint or rule.hint)
    if name.endswith("_pkey"):
        message = (diag.message_detail or diag.message_primary or "").rstrip(".")
        return AlreadyHappened(message, name, state, "It is there already.")
    return None


def _unnamed(error: psycopg.Error, state: str) -> RuleViolation | None:
    """Rules that Postgres enforces without a constraint's name; they get one here."""
    message = error.diag.message_primary or ""
    if state == "23502":
        table, column = error.diag.table_name, error.diag.column_name
        return InvalidValue(
            message, f"{table}_{column}_given", state, f"Give a value for {column}."
        )
    if state == "428C9":
        column = next((c for c in GENERATED if re.search(rf"\b{c}\b", message)), "column")
        name = f"{GENERATED.get(column, 'table')}_{column}_generated"
        return NotOurNumber(message, name, state, f"Leave {column} out; the database computes it.")
    if state == "44000":
        view = next((v for v in PAPER_VIEWS if re.search(rf"\b{v}\b", message)), "view")
        return InvalidValue(
            message,
            f"{view}_shows_the_row",
            state,
            "Use the base table for a run that isn't paper.",
        )
    return None


@contextmanager
def translated() -> Iterator[None]:
    """Raise database errors as types of this module; what is none of them passes unchanged."""
    try:
        yield
    except psycopg.Error as error:
        meaning = typed(error)
        if meaning is None:
            raise
        raise meaning from error
