"""An OpenAI-compatible server with the dial per request, and a page that shows where the compute went.

From the bottom: `scheduler` and `adaptive` are pure data, `backend` runs rows of a batch that join and leave, `engine`
joins the two in one worker thread, `schema` and `app` are HTTP. `schema`, `app`, `metrics` and `server` need the extra
`serve` (fastapi, uvicorn, prometheus-client); the others do not.
"""
