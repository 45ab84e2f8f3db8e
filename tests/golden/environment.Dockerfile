# syntax=docker/dockerfile:1
# Made by `dayfly environment build --image`: make it anew when the requirements change.
#   docker build -t registry.example.com/thumbs:1 - < Dockerfile
ARG RUNTIME=registry.example.com/dayfly-runtime:0.1.0
ARG PYTHON=python:3.11-slim
ARG UV=ghcr.io/astral-sh/uv:0.8.0

FROM ${UV} AS uv

FROM ${PYTHON} AS build
COPY --from=uv /uv /usr/local/bin/uv
COPY <<'LOCKED' /requirements.txt
humanize==4.12.0 --hash=sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa
tzdata==2025.2 ; sys_platform == 'win32' --hash=sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb
LOCKED
RUN uv pip install --require-hashes --only-binary :all: --no-cache --link-mode copy \
      --python python3 --target /environment -r /requirements.txt \
 && rm -f /environment/.lock \
 && find /environment -name __pycache__ -prune -exec rm -rf {} + \
 && python3 -I -S -m compileall -q -j 0 --invalidation-mode unchecked-hash /environment \
 && chmod -R a+rX /environment

FROM ${RUNTIME}
COPY --from=build /environment /environment
