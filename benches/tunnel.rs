//! What `baletheus tunnel` costs: `cargo bench --bench tunnel`, or `… -- 1000 300` for 1,000 devices of which 300 hang.
//!
//! Scrapes as Prometheus does, each device once in 15 s and all of them spread over that, first straight and then through
//! the binary as benches build it and a stand-in for balena's VPN proxy, over TLS, both in this process. CPU and memory are the
//! tunnel's alone. Prints a row of a table for each run.

#[path = "../tests/support"]
pub mod support {
    pub mod cloud;
    pub mod odata;
    pub mod recording;
    pub mod sidecar;
    pub mod tls;
    pub mod vpn;
}

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use reqwest::{Client, Proxy};
use rustls::ServerConfig;
use serde_json::json;
use support::sidecar::{Running, Sidecar};
use support::tls::Authority;
use support::vpn::{Device, Vpn};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

const KEY: &str = "a-key-for-the-bench";
const INTERVAL: Duration = Duration::from_secs(15);
/// Intervals that count, after the first one, in which the tunnels are opened.
const ROUNDS: u32 = 2;
/// Prometheus' scrape time-out.
const TIMEOUT: Duration = Duration::from_secs(10);

fn main() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let numbers: Vec<usize> = std::env::args().filter_map(|arg| arg.parse().ok()).collect();
    let runs =
        if let [devices, hang] = numbers[..] { vec![(devices, hang)] } else { vec![(1000, 0), (1000, 300), (5000, 0)] };
    println!(
        "| devices | hang | way | scrapes | lost | median | 99th | CPU of a core | peak memory | handshakes | sent, received a scrape |\n\
         | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    );
    let exporter = exporter();
    for (devices, hang) in runs {
        run(devices, hang, exporter);
    }
}

/// An exporter with 60 KB, as often as it is asked.
fn exporter() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let addr = listener.local_addr().expect("an address");
    listener.set_nonblocking(true).expect("a socket");
    let body = "node_cpu_seconds_total{cpu=\"0\",mode=\"user\"} 1234.56\n".repeat(60_000 / 51);
    let head =
        format!("HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\n\r\n", body.len());
    let answer: Arc<[u8]> = (head + &body).into_bytes().into();
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).expect("a socket");
            while let Ok((mut stream, _)) = listener.accept().await {
                let _ = stream.set_nodelay(true); // it may be slower without
                let answer = answer.clone();
                tokio::spawn(async move {
                    let (mut buffer, mut end) = ([0; 4096], 0);
                    while let Ok(length @ 1..) = stream.read(&mut buffer[end..]).await {
                        end += length;
                        if buffer[..end].ends_with(b"\r\n\r\n") {
                            end = 0;
                            if stream.write_all(&answer).await.is_err() {
                                return;
                            }
                        }
                    }
                });
            }
        });
    });
    addr
}

fn run(devices: usize, hang: usize, exporter: SocketAddr) {
    let authority = Authority::generate();
    let server: Arc<ServerConfig> = authority.server(&["localhost"]);
    let vpn = Vpn::start(KEY, Some(server));
    let names: Vec<_> = (0..devices).map(|number| format!("{number:032x}")).collect();
    for (number, name) in names.iter().enumerate() {
        // those that hang stand among the others
        let silent = number * hang / devices != (number + 1) * hang / devices;
        vpn.device(name, |device| *device = Device { silent, offline: false, ports: [(9100, exporter)].into() });
    }
    let groups: Vec<_> = names.iter().map(|name| json!({"targets": [format!("{name}.balena:9100")]})).collect();
    let sidecar = Sidecar::new(env!("CARGO_BIN_EXE_baletheus")).env("API_KEY", KEY).env("BALENA_CA_FILE", "ca.pem");
    fs::write(sidecar.path("ca.pem"), authority.pem()).expect("written");
    fs::write(sidecar.path("balena.json"), serde_json::to_string(&groups).expect("JSON")).expect("written");
    let (tunnel, url) = sidecar.tunnel(&format!("https://localhost:{}", vpn.addr.port()));

    let direct = Client::builder().no_proxy().timeout(TIMEOUT).build().expect("a client");
    // Prometheus has few connections to a proxy for many targets; this client would keep one for each.
    let through = Client::builder().pool_max_idle_per_host(0);
    let through = through.proxy(Proxy::http(&url).expect("a URL")).timeout(TIMEOUT).build().expect("a client");
    let straight = vec![format!("http://{exporter}/metrics"); devices];
    let (_, latencies) = scrape(&direct, &straight, ROUNDS);
    drop(direct); // with its connections: the files that this process may open have a limit
    println!("{}", row(devices, 0, "straight", &latencies, ROUNDS as usize * devices, "| | | |"));

    let urls: Vec<_> = names.iter().map(|name| format!("http://{name}.balena:9100/metrics")).collect();
    scrape(&through, &urls, 1);
    let before = usage(&tunnel, &url);
    let (took, latencies) = scrape(&through, &urls, ROUNDS);
    let after = usage(&tunnel, &url);
    let scrapes = ROUNDS as usize * (devices - hang);
    let [cpu, handshakes, sent, received] = [0, 1, 2, 3].map(|index| after[index] - before[index]);
    let all = (ROUNDS as usize * devices) as f64;
    let costs = format!(
        "{:.1} % | {:.1} MiB | {handshakes} | {:.0} B, {:.0} B |",
        100.0 * cpu / took.as_secs_f64(),
        after[4] / 1024.0,
        sent / all,
        received / all
    );
    println!("{}", row(devices, hang, "tunnel", &latencies, scrapes, &costs));
}

fn row(devices: usize, hang: usize, way: &str, latencies: &[Duration], expected: usize, costs: &str) -> String {
    let ms = |part: usize| latencies[(latencies.len() - 1) * part / 100].as_secs_f64() * 1000.0;
    let lost = expected - latencies.len();
    format!(
        "| {devices} | {hang} | {way} | {} | {lost} | {:.1} ms | {:.1} ms | {costs}",
        latencies.len(),
        ms(50),
        ms(99)
    )
}

/// Scrapes all, each at its moment of the interval; gives the whole time and, sorted, how long those took that came.
fn scrape(client: &Client, urls: &[String], rounds: u32) -> (Duration, Vec<Duration>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let (start, mut scrapes) = (tokio::time::Instant::now(), JoinSet::new());
        for (number, url) in urls.iter().enumerate() {
            let (client, url) = (client.clone(), url.clone());
            let offset = INTERVAL * u32::try_from(number).expect("a few") / u32::try_from(urls.len()).expect("a few");
            scrapes.spawn(async move {
                let mut took = Vec::new();
                for round in 0..rounds {
                    tokio::time::sleep_until(start + offset + INTERVAL * round).await;
                    let asked = Instant::now();
                    let request = client.get(&url).header("X-Prometheus-Scrape-Timeout-Seconds", TIMEOUT.as_secs());
                    let Ok(answer) = request.send().await.and_then(reqwest::Response::error_for_status) else {
                        continue;
                    };
                    if answer.bytes().await.is_ok_and(|body| body.len() > 59_000) {
                        took.push(asked.elapsed());
                    }
                }
                took
            });
        }
        let mut took = scrapes.join_all().await.concat();
        took.sort_unstable();
        (start.elapsed(), took)
    })
}

/// CPU seconds, handshakes, bytes sent and received, and the peak of memory in KiB.
fn usage(tunnel: &Running, url: &str) -> [f64; 5] {
    let proc = |file: &str| fs::read_to_string(format!("/proc/{}/{file}", tunnel.id())).expect("it runs");
    let (stat, status) = (proc("stat"), proc("status"));
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok());
    // behind the name, which may hold anything: utime and stime, in ticks of 10 ms
    let ticks = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
    let cpu: f64 = ticks.map(|ticks| ticks.parse::<f64>().expect("ticks") / 100.0).sum();
    let client = reqwest::blocking::Client::builder().no_proxy().build().expect("a client");
    let text =
        client.get(format!("{url}/metrics")).send().and_then(reqwest::blocking::Response::text).expect("an answer");
    let metric = |name: &str| -> f64 {
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        value.unwrap_or_else(|| panic!("no {name} in:\n{text}"))
    };
    [
        cpu,
        metric("baletheus_tunnel_handshakes_total"),
        metric("baletheus_tunnel_bytes_total{direction=\"sent\"}"),
        metric("baletheus_tunnel_bytes_total{direction=\"received\"}"),
        peak.expect("VmHWM"),
    ]
}
