"""Why a connection could not be opened, read from the only thing there is: libpq's text.

While a connection is being opened libpq keeps no SQLSTATE, so psycopg has none to give (`Error.sqlstate` is None for a
wrong password too). What is left is the message, whose server part PostgreSQL writes in the language of its
``lc_messages``.

INVARIANT. A text that is not recognised is a database that is away, never the other way round: "the password is wrong"
is only said when the server said so. A server that speaks another language than English is therefore retried just as
long, and its own words are in the log; what libpq says of itself (TLS, host names) is English everywhere.

What it refuses to do: end the bridge. A sidecar may start before its secret is rotated in, a certificate before its CA
is mounted, and a crash loop would be the same retry with less to read. The bridge stays alive, is not ready, and says
at ERROR what to do.
"""

import re
from typing import Final

_CREDENTIALS: Final = (
    "the server refuses the credentials: rotate them in. A `passfile=` named in the DSN (or PGPASSFILE) is read again "
    "at each new connection, a password inside the DSN only when the bridge starts"
)
_UNREADABLE: Final = (
    "put the password where libpq finds it. It ignores a passfile that its group or others may read (chmod 0600; a "
    "mounted secret: defaultMode 0400 and the right owner), and one without a line for this host, port, database, role"
)
_HBA: Final = (
    "let the server's administrator add a line for this role, database and address to pg_hba.conf. The message says "
    "whether it came encrypted: 'no encryption' may only mean that sslmode=require is missing in the DSN"
)
_CA: Final = (
    "`sslrootcert=` in the DSN must name the certificate of the CA that signed the server's (on Amazon RDS the bundle "
    "of the region); or the server's certificate has expired. Do not lower sslmode"
)
_NAME: Final = (
    "use in the DSN a host name that is in the certificate (`hostaddr=` may give its address), or have the certificate "
    "issued for this name. Do not lower sslmode"
)
_NO_TLS: Final = (
    "the server has ssl = off, or something in between does not pass TLS on: name the server itself, or let its "
    "administrator set ssl = on. Do not lower sslmode"
)
_CLIENT: Final = (
    "the server refuses the client's certificate: `sslcert=` and `sslkey=` must name a valid pair whose CA its "
    "ssl_ca_file holds"
)
_FILES: Final = "`sslcert=`, `sslkey=` and `sslrootcert=` must name files that this process, and nobody else, may read"
_SERVICE: Final = "mend `service=` in the DSN, or put the service into ~/.pg_service.conf or the file of PGSERVICEFILE"
_WALSENDER: Final = "ALTER ROLE … WITH REPLICATION; (on Amazon RDS: GRANT rds_replication TO the role)"

# In the words of PostgreSQL's auth.c, postinit.c and walsender.c, and of libpq's fe-auth.c and fe-secure-openssl.c.
_KNOWN: Final = (
    (re.compile(r"\w+ authentication failed for user"), _CREDENTIALS),  # password, PAM (RDS's IAM tokens), LDAP, …
    (re.compile(r"no password supplied|empty password returned"), _UNREADABLE),
    (re.compile(r"no pg_hba\.conf entry|pg_hba\.conf rejects"), _HBA),
    (re.compile(r'role ".*" does not exist'), "create the role, or mend `user=` in the DSN"),
    (re.compile(r'role ".*" is not permitted to log in'), "ALTER ROLE … LOGIN"),
    (re.compile(r'database ".*" does not exist'), "mend `dbname=` in the DSN; the server has no such database"),
    (re.compile(r"permission denied for database"), "GRANT CONNECT ON DATABASE … TO the role"),
    (re.compile(r"permission denied to start WAL sender|replication role to start walsender"), _WALSENDER),
    (re.compile(r"certificate verify failed"), _CA),
    (re.compile(r'root certificate file ".*" does not exist'), _CA),
    (re.compile(r"server certificate for .* does not match host name"), _NAME),
    (re.compile(r"server does not support SSL"), _NO_TLS),
    (re.compile(r"valid client certificate|alert (certificate|bad certificate|unknown ca)"), _CLIENT),
    (re.compile(r"definition of service .* not found|service file .* not found"), _SERVICE),
    (re.compile(r'(private key|certificate) file ".*"'), _FILES),
)


def remedy(text: str) -> str | None:
    """What a human must do when opening a connection failed with `text`; None when waiting may be all it takes.

    With several hosts in the DSN the text holds a message for each. One refusal is enough: that another host is away
    as well does not mend it.
    """
    return next((hint for pattern, hint in _KNOWN if pattern.search(text)), None)
