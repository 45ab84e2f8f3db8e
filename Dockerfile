# Gateway and pool, one image: docker build -t dayfly .
ARG PYTHON=python:3.11-slim

FROM ${PYTHON} AS build
WORKDIR /src
RUN python -m venv /opt/dayfly
COPY requirements/server.txt requirements/build.txt requirements/
RUN /opt/dayfly/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps --require-hashes -r requirements/server.txt \
 && python -m venv /opt/build \
 && /opt/build/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps --require-hashes -r requirements/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY runtime runtime
COPY pool pool
COPY gateway gateway
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
 && /opt/dayfly/bin/pip install --no-cache-dir --no-deps --no-index /wheels/*.whl \
 && /opt/dayfly/bin/python -m compileall -q /opt/dayfly/lib \
 && /opt/dayfly/bin/pip uninstall --yes --quiet setuptools pip

FROM ${PYTHON}
RUN groupadd --gid 65532 dayfly \
 && useradd --uid 65532 --gid 65532 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin dayfly
COPY --from=build /opt/dayfly /opt/dayfly
ENV PATH=/opt/dayfly/bin:$PATH
USER 65532:65532
ENTRYPOINT ["dayfly"]
