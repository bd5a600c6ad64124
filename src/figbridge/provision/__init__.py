"""What `figbridge init` makes and `figbridge teardown` removes; and the same as SQL, for a DBA to read and sign.

    figbridge schema ─▶ publications ─▶ slot
    └──── one transaction ─────────┘

THE ORDER IS THE POINT. pgoutput looks a publication up in the catalogue *as it was when a change was made*. A slot
that is older than its publication therefore meets changes for which there is none: up to PostgreSQL 17 it fails with
"publication … does not exist", at the same place for ever; from 18 on it leaves the changes out. And the inbox's
publication needs the inbox. The slot comes after COMMIT, because none can be made in a transaction that has written.
Each publication carries in its comment where in the WAL it was made, by which the preflight knows a slot that is older.

INVARIANT. Legacy tables are read, never altered. Before COMMIT the server is asked (EXPLAIN DELETE, which plans and
does nothing) whether the application can still UPDATE and DELETE in every published table; if not, nothing was done.

What it refuses: FOR ALL TABLES (it publishes tables nobody named, and breaks the UPDATEs of those without a replica
identity); dropping a table from a publication (that renumbers the rows of transactions that are delivered in part, and
the numbers are their ids; it is reported instead); tearing down what somebody else still uses.

A slot that is lost is made anew by the bridge itself where forward.on-slot-loss says so (`recreate`).

`script` and `initialise` share every statement (`statements`), so what the DBA signs is what the command does.
"""

from figbridge.provision.make import initialise
from figbridge.provision.recreate import recreate
from figbridge.provision.remove import teardown
from figbridge.provision.statements import publications, script

__all__ = ["initialise", "publications", "recreate", "script", "teardown"]
