# The bridge as an image: small, non-root, read-only at run time except for /var/lib/figbridge.
#
# One base for both stages, any Debian-like one with Python 3.11+ and its venv module:
#   docker build --build-arg BASE_IMAGE=python:3.12-slim -t figbridge .
# Behind a proxy or a private package index, lend the build what it needs; nothing of it stays in the image:
#   docker build --secret id=pip.conf,src=/etc/pip.conf \
#                --secret id=ca-certificates,src=/etc/ssl/certs/ca-certificates.crt -t figbridge .
# (HTTP_PROXY and its siblings are build arguments that Docker knows by itself.) Needs BuildKit, the default since 23.
#
# What a configuration needs beyond the bridge goes in here, for the image has no pip: extras of figbridge, and packages
# with sinks, sources or statements of your own (docs/plugins.md), from the index of pip.conf:
#   docker build --build-arg EXTRAS=crt --build-arg PACKAGES="acme-figbridge==1.2 acme-loyalty==3.0" -t figbridge .

ARG BASE_IMAGE=python:3.13-slim

FROM ${BASE_IMAGE} AS build
WORKDIR /build
RUN python3 -m venv /opt/pip
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca-certificates,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=cache,target=/root/.cache/pip \
    /opt/pip/bin/pip --disable-pip-version-check wheel --no-deps --wheel-dir /wheel .
COPY deploy/constraints.txt ./
ARG EXTRAS=""
ARG PACKAGES=""
# --without-pip: what cannot install packages cannot be made to. The pip beside it fills the venv from outside.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca-certificates,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv --without-pip /opt/figbridge \
    && /opt/pip/bin/pip --disable-pip-version-check --python /opt/figbridge/bin/python \
       install --only-binary :all: -c constraints.txt "$(echo /wheel/*.whl)${EXTRAS:+[$EXTRAS]}" $PACKAGES \
    && /opt/figbridge/bin/figbridge --help > /dev/null

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="figbridge" \
      org.opencontainers.image.description="Strangler-pattern change-data-capture bridge for PostgreSQL" \
      org.opencontainers.image.licenses="Apache-2.0"
# A name for the number: libpq looks the user up when the DSN names none. /var/lib/figbridge is the only place that
# is written to: what a file or local sink and file dead letters with relative paths use. Mount storage there.
# Group 0 may write there too: some platforms (OpenShift) run an image under a number of their own, in that group.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /var/lib/figbridge --shell /usr/sbin/nologin figbridge \
    && install --directory --owner=10001 --group=0 --mode=0770 /var/lib/figbridge
# The same path as in the build stage: a venv's scripts name their interpreter by its full path.
COPY --from=build /opt/figbridge /opt/figbridge
ENV PATH=/opt/figbridge/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /var/lib/figbridge
# By number, so that Kubernetes' runAsNonRoot can verify it.
USER 10001:10001

EXPOSE 9464
# FIGBRIDGE_LISTEN is what deploy/examples/bridge.yaml puts into http.listen, so both always agree. http.client and not
# urllib: a proxy from the environment must not stand between the bridge and its own health check.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["python3", "-c", "\
import http.client, os, sys\n\
probe = http.client.HTTPConnection(os.environ.get('FIGBRIDGE_LISTEN', '127.0.0.1:9464'), timeout=3)\n\
probe.request('GET', '/livez')\n\
sys.exit(probe.getresponse().status != 200)"]

# Exec form: the bridge is process 1 and the engine's SIGTERM reaches it, so `docker stop` drains and confirms the slot.
STOPSIGNAL SIGTERM
ENTRYPOINT ["figbridge"]
CMD ["run", "-c", "/etc/figbridge/bridge.yaml"]
