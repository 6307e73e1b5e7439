"""A trained run over HTTP: routes as the ``openai`` package calls them, and a page to talk to.

:func:`lalia.serve.app.build` makes the application. What is offered depends on what the system can do (:mod:`lalia.system`),
never on its name.
"""
