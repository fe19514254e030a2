def test_smoke(wire):
    o = wire.working(limit_price="100")
    n=[wire.fill(o,"4","99.5","1.01"), wire.fill(o,"6","99","2.01"), wire.fill(o,"6","99","2.01")]
    a=wire.apply()
    print(a, [wire.finding(x) for x in n], wire.order(o)["status"], wire.position(), wire.cash(), wire.order(o)["avg_fill_price"])
    wire.say("COMMISSION", execution_id="1.01", amount="1.25", currency="USD"); print(wire.apply(), wire.cash())
    wire.say("BUST", o, execution_id="2.01"); print(wire.apply(), wire.cash(), wire.position(), wire.order(o)["status"])
    p = wire.working(limit_price="90", quantity="5")
    print(wire.modify(p, limit_price="91"), wire.order(p)["status"]); wire.sent(p)
    wire.say("MODIFIED", p, quantity="5", limit_price="91"); print(wire.apply(), wire.order(p)["limit_price"], wire.order(p)["status"])
    print(wire.cancel(p), wire.kinds(p)); wire.sent(p); wire.status(p,"CANCELED"); wire.apply(); print(wire.order(p)["status"])
    print(wire.cancel(p))
    for e in wire.events(): print(e)
    views=[v for (v,) in wire.conn.execute("select viewname from pg_views where viewname like 'audit%' and viewname<>'audit_guard'").fetchall()]
    print([ (v,r) for v in views for r in wire.conn.execute(f"select subject, finding from {v}").fetchall()])
    assert 0
