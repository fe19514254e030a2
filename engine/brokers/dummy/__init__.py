"""The dummy broker: a small simulated exchange in a process of its own, and its adapter.

* ``model``     orders, symbols, accounts and reports as values
* ``book``      what trades, symbol by symbol
* ``ledger``    accounts: cash, positions, and the reports that they follow from
* ``store``     all of it in SQLite, so that a kill loses nothing that was said
* ``faults``    fault plans: what goes wrong on purpose, and when
* ``post``      sessions, and what is said to them (swallowed, repeated, late, out of order)
* ``exchange``  the exchange itself: no socket, no clock of its own, the same each time
* ``mischief``  what each fault does to it
* ``server``    the process: its protocol, its sockets
* ``desk``      what the control connection may do
* ``control``   a blocking client of it, for tests and people
* ``adapter``   the connector's side
"""
