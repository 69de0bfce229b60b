"""Who may do what: users, projects, memberships, API keys and their scopes."""
