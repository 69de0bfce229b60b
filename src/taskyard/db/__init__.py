"""The database: connections, migrations, notifications, and the embedded server."""
