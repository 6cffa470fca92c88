# The proxy and the tools it speaks to the kernel with. It needs CAP_NET_ADMIN in its network namespace, nothing more:
#   docker run --cap-drop ALL --cap-add NET_ADMIN --read-only --tmpfs /var/lib/userspace-proxy \
#     -v ./manifests:/manifests:ro IMAGE
# Then ask it: docker exec CONTAINER userspace-proxy why NAME
FROM debian:bookworm-slim@sha256:96e378d7e6531ac9a15ad505478fcc2e69f371b10f5cdf87857c4b8188404716 AS build
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3-venv \
 && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml requirements-dev.txt README.md LICENSE /source/
COPY userspace_proxy /source/userspace_proxy
# The locked versions are the ones that the tests ran with.
RUN python3 -m venv /opt/userspace-proxy \
 && /opt/userspace-proxy/bin/pip install --no-cache-dir --constraint /source/requirements-dev.txt /source

FROM debian:bookworm-slim@sha256:96e378d7e6531ac9a15ad505478fcc2e69f371b10f5cdf87857c4b8188404716 AS proxy
RUN apt-get update \
 && apt-get install --yes --no-install-recommends conntrack iproute2 nftables python3 \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/userspace-proxy /opt/userspace-proxy
ENV PATH=/opt/userspace-proxy/bin:$PATH
# 200 once the first sync is in force; urlopen raises for anything else.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
  CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:10256/healthz', timeout=2)"]
ENTRYPOINT ["userspace-proxy"]
CMD ["run", "/manifests"]

# The proxy, a backend and the client of docker-compose.yml. Their files are copied, not mounted: a container without
# capabilities cannot read a checkout that was made with umask 077.
FROM proxy AS demo-proxy
COPY examples/compose/web.yaml /manifests/

FROM nginx:1.28-alpine@sha256:a8b39bd9cf0f83869a2162827a0caf6137ddf759d50a171451b335cecc87d236 AS demo-web
COPY examples/compose/nginx.conf /etc/nginx/nginx.conf
ENV NGINX_ENTRYPOINT_QUIET_LOGS=1

# The image of the backends, for its curl and ip: nothing more to pull.
FROM demo-web AS demo-client
COPY examples/compose/client.sh /
STOPSIGNAL SIGTERM
ENTRYPOINT ["sh", "/client.sh"]

# The proxy, and what `compare` measures it with and beside: `docker build --target compare .`
FROM proxy AS compare
RUN apt-get update \
 && apt-get install --yes --no-install-recommends haproxy iperf3 iptables libnginx-mod-stream nginx-light procps strace wrk \
 && rm -rf /var/lib/apt/lists/*
HEALTHCHECK NONE
CMD ["compare", "--html", "/report/report.html", "--json", "/report/figures.json"]

# Without --target: the proxy.
FROM proxy
