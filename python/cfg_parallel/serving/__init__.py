"""`cfg-parallel serve`: an OpenAI-compatible server for pictures.

`server` starts it, `app` has the routes, `schemas` what a request may hold, `pictures` reads and writes images,
`dispatcher` is the queue, `replica` the server's side of an engine and `worker` its process, `work` what goes between
them, `preview` the unfinished pictures, `observability` the logs and metrics, `page/` the web page.
"""
