# One stage for each service of docker-compose.yml. Stages without a compiler come first: builders without BuildKit, such as
# balena's, run every stage up to the requested one.

FROM prom/prometheus:v3.13.4 AS prometheus
USER root
# A new volume gets its owner from here, so that only the sidecar may write targets. /tmp is a tmpfs and gets its mode from here.
RUN mkdir -p /targets /tmp && chown 65532:65532 /targets && chmod 1777 /tmp
COPY packaging/entrypoints/common packaging/entrypoints/prometheus packaging/entrypoints/dropped.yml /entrypoints/
COPY prometheus.yml /etc/prometheus/prometheus.yml
COPY alerts /etc/prometheus/alerts
USER 65534:65534
ENTRYPOINT ["/bin/sh", "/entrypoints/prometheus"]
CMD []

FROM prom/alertmanager:v0.34.1 AS alertmanager
USER root
RUN mkdir -p /tmp && chmod 1777 /tmp
COPY packaging/entrypoints/common packaging/entrypoints/alertmanager /entrypoints/
COPY alerts/alertmanager /etc/alertmanager
USER 65534:65534
ENTRYPOINT ["/bin/sh", "/entrypoints/alertmanager"]
CMD []

# 12.x, because since 13.2 the Prometheus data source is a plugin that updates itself at the start.
FROM grafana/grafana:12.4.12 AS grafana
USER root
# The database is on a tmpfs, which gets its mode from here. A new volume gets its owner from here, so that only Grafana can read
# the password.
RUN mkdir -p /password && chown 472:0 /password && chmod 700 /password && chmod 1777 /var/lib/grafana
COPY packaging/entrypoints/common packaging/entrypoints/grafana /entrypoints/
COPY grafana/grafana.ini /etc/grafana/grafana.ini
COPY grafana/provisioning /etc/grafana/provisioning
COPY dashboards /etc/grafana/dashboards
# A dashboard from grafana.com names its data source as an input of its import, which files of provisioning do not have.
RUN sed -i 's/\${DS_[A-Za-z0-9_-]*}/prometheus/g' /etc/grafana/dashboards/*.json
USER 472:0
ENTRYPOINT ["/bin/sh", "/entrypoints/grafana"]
CMD []

FROM rust:1.95.0-slim-bookworm AS build
WORKDIR /build
# A build takes 1.2 GB of memory. A device with 1 GiB optimises the crates one by one instead, which takes 0.7 GB.
RUN mkdir .cargo && free=$(awk '/^(MemAvailable|SwapFree):/ { sum += $2 } END { print int(sum / 1024) }' /proc/meminfo) \
    && if [ "$free" -lt 700 ]; then \
        echo "compiling takes 700 MiB of memory and swap, and $free MiB are free: stop other containers, or add swap" >&2; exit 1; \
    elif [ "$free" -lt 1300 ]; then \
        echo "$free MiB of memory and swap are free: compiling takes longer, and the program is 0.3 MB larger"; \
        printf '[build]\njobs = 1\n[profile.release]\nlto = "thin"\n' >.cargo/config.toml; \
    fi
# The dependencies are compiled first, in their own layer: they change less often than the program, and take longer.
COPY Cargo.toml Cargo.lock ./
# Not compiled, but Cargo.toml names them.
COPY benches benches
RUN mkdir src && echo 'fn main() {}' >src/main.rs && touch src/lib.rs && cargo build --release --locked
COPY src src
RUN touch src/*.rs && cargo build --release --locked
# The whole content of the image: the program, the libraries that it needs, and the root certificates.
RUN mkdir -p /image/etc/ssl/certs /targets \
    && cp target/release/baletheus /image/baletheus \
    && ldd target/release/baletheus | grep -o '/[^ ]*' | xargs cp -L --parents -t /image \
    && cp -L /etc/ssl/certs/ca-certificates.crt /image/etc/ssl/certs/ \
    && echo 'baletheus:x:65532:65532::/:' >/image/etc/passwd \
    && echo 'hosts: files dns' >/image/etc/nsswitch.conf

FROM scratch AS baletheus
COPY --from=build /image /
COPY --from=build --chown=65532:65532 /targets /targets
ENV SD_FILE_PATH=/targets/balena.json LISTEN_ADDRESS=:9797 TUNNEL_LISTEN_ADDRESS=:9798
USER 65532:65532
ENTRYPOINT ["/baletheus"]

# The simulated balenaCloud of examples/demo. It is the last stage, so that no other build runs it.
FROM build AS demo-build
COPY examples/demo examples/demo
COPY tests/support tests/support
# The demo starts a Prometheus with it, outside of containers.
COPY prometheus.yml ./
RUN cargo build --locked --example demo
FROM rust:1.95.0-slim-bookworm AS demo
COPY --from=demo-build /build/target/debug/examples/demo /demo
USER 65532:65532
ENTRYPOINT ["/demo", "--serve"]
