"""The description of the API for programs (OpenAPI) and people (a page that shows it)."""
