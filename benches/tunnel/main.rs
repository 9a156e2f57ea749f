//! What `baletheus tunnel` costs: `cargo bench --bench tunnel`, or `… -- 1000 300` for 1,000 devices of which 300 hang, or
//! `… -- 1000 300 7500` with an interval of 7,500 ms.
//!
//! Scrapes as Prometheus does, each device once in an interval and all of them spread over that: straight, through a bare relay
//! (`floor.rs`), and through the tunnel: the binary that `BALETHEUS` names, or else the one that benches build. Relay and tunnel take
//! turns, interval by interval, each with its own stand-in for balena's VPN proxy, over TLS. Each is a process; CPU and memory are
//! the relay's or the tunnel's alone. Prints a row of a table for each way.

mod floor;

#[path = "../../tests/support"]
pub mod support {
    pub mod cloud;
    pub mod odata;
    pub mod recording;
    pub mod sidecar;
    pub mod tls;
    pub mod vpn;
}

use std::env;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::time::TimeValLike;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::json;
use support::sidecar::{Running, Sidecar};
use support::tls::Authority;
use support::vpn::{Device, Vpn};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinSet;

use crate::floor::read_head;

const KEY: &str = "a-key-for-the-bench";
const INTERVAL: Duration = Duration::from_secs(15);
/// The most devices for the floor, which has no bounds: the files that a process may open have a limit.
const FLOOR_DEVICES: usize = 6000;
/// Intervals that count, after the first one, in which the tunnels are opened.
const ROUNDS: usize = 3;
/// Prometheus' scrape time-out.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The variable with the role of a child process.
const ROLE: &str = "BENCH_ROLE";

fn main() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    match env::var(ROLE).as_deref() {
        Ok("exporter") => return runtime().block_on(exporter()).expect("it serves"),
        Ok("vpn") => return vpn(),
        Ok("floor") => {
            let roots = CertificateDer::from_pem_file("ca.pem").expect("a certificate");
            let mut store = RootCertStore::empty();
            store.add(roots).expect("a root");
            return runtime().block_on(floor::serve(argument("VPN"), store)).expect("it serves");
        }
        _ => {}
    }
    let numbers: Vec<usize> = env::args().filter_map(|arg| arg.parse().ok()).collect();
    let run = |devices, hang, interval| Load { devices, hang, interval };
    let runs = match numbers[..] {
        [devices, hang] => vec![run(devices, hang, INTERVAL)],
        [devices, hang, ms] => vec![run(devices, hang, Duration::from_millis(ms as u64))],
        _ => vec![
            run(1000, 0, INTERVAL),
            run(1000, 300, INTERVAL),
            run(5000, 0, INTERVAL),
            run(5000, 0, INTERVAL / 2), // the scrapes of 10,000 devices
            run(10_000, 0, INTERVAL),
        ],
    };
    println!(
        "| devices | hang | every | way | scrapes | lost | median | 99th | CPU of a core | CPU a scrape | of the floor's | peak memory | \
         handshakes | sent, received a scrape |\n\
         | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    );
    for load in runs {
        measure(load);
    }
}

/// Devices, of which some hang, and the interval in which each is scraped once.
#[derive(Clone, Copy)]
struct Load {
    devices: usize,
    hang: usize,
    interval: Duration,
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().expect("a runtime")
}

fn argument<T: std::str::FromStr>(name: &str) -> T {
    env::var(name).ok().and_then(|value| value.parse().ok()).expect("the parent sets it")
}

fn print(line: &str) {
    println!("{line}");
}

/// This program in another role.
fn child(role: &str, edit: impl FnOnce(Sidecar) -> Sidecar) -> (Sidecar, Running) {
    let child = edit(Sidecar::new(env::current_exe().expect("a path")).env(ROLE, role));
    let running = child.start();
    (child, running)
}

fn address(running: &Running) -> SocketAddr {
    let line = running.wait_for(" on ");
    line.rsplit(' ').next().and_then(|addr| addr.parse().ok()).expect("an address")
}

/// An exporter that answers each request with 60 KB.
async fn exporter() -> io::Result<()> {
    let body = "node_cpu_seconds_total{cpu=\"0\",mode=\"user\"} 1234.56\n".repeat(60_000 / 51);
    let head =
        format!("HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\n\r\n", body.len());
    let answer: Arc<[u8]> = (head + &body).into_bytes().into();
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    print(&format!("exporter on {}", listener.local_addr()?));
    loop {
        let (mut stream, answer) = (listener.accept().await?.0, answer.clone());
        stream.set_nodelay(true)?; // it may be slower without
        tokio::spawn(async move {
            let mut buffer = [0; 4096];
            while read_head(&mut stream, &mut buffer).await.is_ok() && stream.write_all(&answer).await.is_ok() {}
        });
    }
}

/// A stand-in for balena's VPN proxy, with the devices; some of them hang.
fn vpn() {
    let (devices, hang, exporter) = (argument("DEVICES"), argument::<usize>("HANG"), argument("EXPORTER"));
    let authority = Authority::generate();
    fs::write("ca.pem", authority.pem()).expect("written");
    let vpn = Vpn::start(KEY, Some(authority.server(&["localhost"])));
    for number in 0..devices {
        // Those that hang are spread among the others.
        let silent = number * hang / devices != (number + 1) * hang / devices;
        vpn.device(&name(number), |device| {
            *device = Device { silent, offline: false, ports: [(9100, exporter)].into() }
        });
    }
    print(&format!("vpn on {}", vpn.addr));
    loop {
        thread::park();
    }
}

fn name(number: usize) -> String {
    format!("{number:032x}")
}

/// A way to the devices: a process, and the stand-in that it goes through.
struct Way {
    name: &'static str,
    prometheus: Arc<Prometheus>,
    process: Running,
    latencies: Vec<Duration>,
    cpu: Vec<Duration>,
    _sidecar: Sidecar,
    _vpn: (Sidecar, Running),
}

impl Way {
    fn floor(load: Load, exporter: SocketAddr) -> Self {
        let (vpn, at) = Self::vpn(Load { hang: 0, ..load }, exporter);
        let child = Sidecar::new(env::current_exe().expect("a path")).env(ROLE, "floor").env("VPN", at.to_string());
        fs::copy(vpn.0.path("ca.pem"), child.path("ca.pem")).expect("copied");
        let process = child.start();
        let addr = address(&process);
        Self::new("floor", process, addr, child, vpn)
    }

    fn tunnel(load: Load, exporter: SocketAddr) -> Self {
        let (vpn, at) = Self::vpn(load, exporter);
        let binary = env::var("BALETHEUS").unwrap_or_else(|_| env!("CARGO_BIN_EXE_baletheus").to_owned());
        let sidecar = Sidecar::new(binary).env("API_KEY", KEY).env("BALENA_CA_FILE", "ca.pem");
        fs::copy(vpn.0.path("ca.pem"), sidecar.path("ca.pem")).expect("copied");
        let targets = (0..load.devices).map(|number| json!({"targets": [format!("{}.balena:9100", name(number))]}));
        let targets = serde_json::to_string(&targets.collect::<Vec<_>>()).expect("JSON");
        fs::write(sidecar.path("balena.json"), targets).expect("written");
        let (process, url) = sidecar.tunnel(&format!("https://localhost:{}", at.port()));
        let addr = url.strip_prefix("http://").and_then(|addr| addr.parse().ok()).expect("an address");
        Self::new("tunnel", process, addr, sidecar, vpn)
    }

    fn vpn(load: Load, exporter: SocketAddr) -> ((Sidecar, Running), SocketAddr) {
        let vpn = child("vpn", |child| {
            let child = child.env("DEVICES", load.devices.to_string()).env("HANG", load.hang.to_string());
            child.env("EXPORTER", exporter.to_string())
        });
        let at = address(&vpn.1);
        (vpn, at)
    }

    fn new(name: &'static str, process: Running, addr: SocketAddr, sidecar: Sidecar, vpn: (Sidecar, Running)) -> Self {
        let (prometheus, latencies, cpu) = (Prometheus::to(addr), Vec::new(), Vec::new());
        Way { name, prometheus, process, latencies, cpu, _sidecar: sidecar, _vpn: vpn }
    }

    fn cpu(&self) -> Duration {
        let id = self.process.id().try_into().expect("the id of a process");
        let clock = ClockId::pid_cpu_clock_id(Pid::from_raw(id)).expect("it lives");
        Duration::from_nanos(clock_gettime(clock).expect("a time").num_nanoseconds().unsigned_abs())
    }

    fn measure(&mut self, load: Load) {
        let before = self.cpu();
        self.latencies.extend(scrape(&self.prometheus, load));
        self.cpu.push(self.cpu() - before);
    }

    fn peak(&self) -> f64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id())).expect("it runs");
        let peak =
            status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok());
        peak.map(|peak: f64| peak / 1024.0).expect("VmHWM")
    }

    fn print(&self, load: Load, ratio: &str, handshakes: f64, bytes: &str) {
        let cpu = median(self.cpu.iter().map(Duration::as_secs_f64));
        let costs = format!(
            "{:.1} % | {:.0} µs | {ratio} | {:.1} MiB | {handshakes} | {bytes} |",
            100.0 * cpu / load.interval.as_secs_f64(),
            1e6 * cpu / load.devices as f64,
            self.peak(),
        );
        println!("{}", row(load, self.name, &self.latencies, ROUNDS * (load.devices - load.hang), &costs));
    }
}

fn measure(load: Load) {
    let (_directory, running) = child("exporter", |child| child);
    let exporter = address(&running);
    let straight = scrape(&Prometheus::to(exporter), load);
    println!("{}", row(Load { hang: 0, ..load }, "straight", &straight, load.devices, "| | | | | |"));

    let has_floor = load.hang == 0 && load.devices <= FLOOR_DEVICES;
    let mut floor = has_floor.then(|| Way::floor(load, exporter));
    let mut tunnel = Way::tunnel(load, exporter);
    for way in floor.iter().chain([&tunnel]) {
        scrape(&way.prometheus, load);
    }
    let relayed = |floor: &Option<Way>| floor.as_ref().map_or(0, |floor| floor.process.log().len());
    let (before, opened) = (usage(&tunnel), relayed(&floor));
    for _ in 0..ROUNDS {
        for way in floor.iter_mut().chain([&mut tunnel]) {
            way.measure(load);
        }
    }
    let (after, opened) = (usage(&tunnel), relayed(&floor) - opened);
    let mut ratio = String::new();
    if let Some(floor) = &floor {
        floor.print(load, "1", opened as f64, "");
        let pairs = tunnel.cpu.iter().zip(&floor.cpu);
        ratio = format!("{:.2}", median(pairs.map(|(tunnel, floor)| tunnel.as_secs_f64() / floor.as_secs_f64())));
    }
    let [handshakes, sent, received] = [0, 1, 2].map(|index| after[index] - before[index]);
    let all = (ROUNDS * load.devices) as f64;
    tunnel.print(load, &ratio, handshakes, &format!("{:.0} B, {:.0} B", sent / all, received / all));
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

fn row(load: Load, way: &str, latencies: &[Duration], expected: usize, costs: &str) -> String {
    let mut latencies = latencies.to_vec();
    latencies.sort_unstable();
    let ms = |part: usize| latencies[(latencies.len() - 1) * part / 100].as_secs_f64() * 1000.0;
    let (came, lost) = (latencies.len(), expected - latencies.len());
    let Load { devices, hang, interval } = load;
    let every = interval.as_secs_f64();
    format!(
        "| {devices} | {hang} | {every} s | {way} | {came} | {lost} | {:.2} ms | {:.2} ms | {costs}",
        ms(50),
        ms(99)
    )
}

/// The connections of Prometheus to a proxy, or to the exporter itself: it has one for each scrape at once.
struct Prometheus {
    addr: SocketAddr,
    idle: Mutex<Vec<TcpStream>>,
    runtime: Runtime,
}

impl Prometheus {
    fn to(addr: SocketAddr) -> Arc<Self> {
        Arc::new(Prometheus { addr, idle: Mutex::default(), runtime: runtime() })
    }

    async fn scrape(&self, device: &str) -> io::Result<()> {
        let idle = self.idle.lock().unwrap().pop();
        let mut stream = match idle {
            Some(stream) => stream,
            None => {
                let stream = TcpStream::connect(self.addr).await?;
                stream.set_nodelay(true)?;
                stream
            }
        };
        let request = format!(
            "GET http://{device}.balena:9100/metrics HTTP/1.1\r\nHost: {device}.balena:9100\r\nUser-Agent: Prometheus/3.5.0\r\n\
             Accept: text/plain;version=0.0.4;q=0.3,*/*;q=0.2\r\nX-Prometheus-Scrape-Timeout-Seconds: {}\r\n\r\n",
            TIMEOUT.as_secs()
        );
        stream.write_all(request.as_bytes()).await?;
        let mut buffer = vec![0; 64 << 10];
        let (head, mut came) = read_head(&mut stream, &mut buffer).await?;
        let text = &buffer[..head];
        let length = length(text);
        if !text.starts_with(b"HTTP/1.1 200") || length < 59_000 {
            return Err(io::Error::other("no metrics"));
        }
        while came < head + length {
            match stream.read(&mut buffer).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                length => came += length,
            }
        }
        self.idle.lock().unwrap().push(stream);
        Ok(())
    }
}

/// The Content-Length of a head.
fn length(head: &[u8]) -> usize {
    let text = String::from_utf8_lossy(head).to_ascii_lowercase();
    let length = text.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok());
    length.unwrap_or(0)
}

/// Scrapes all devices in an interval, each at its moment, and returns the durations of the scrapes that succeeded.
fn scrape(prometheus: &Arc<Prometheus>, Load { devices, interval, .. }: Load) -> Vec<Duration> {
    prometheus.runtime.block_on(async {
        let (start, mut scrapes) = (tokio::time::Instant::now(), JoinSet::new());
        for number in 0..devices {
            let (prometheus, device) = (prometheus.clone(), name(number));
            let offset = interval.mul_f64(number as f64 / devices as f64);
            scrapes.spawn(async move {
                tokio::time::sleep_until(start + offset).await;
                let asked = Instant::now();
                let answered = tokio::time::timeout(TIMEOUT, prometheus.scrape(&device)).await;
                answered.is_ok_and(|answer| answer.is_ok()).then(|| asked.elapsed())
            });
        }
        let took = scrapes.join_all().await;
        tokio::time::sleep_until(start + interval).await;
        took.into_iter().flatten().collect()
    })
}

/// Handshakes, bytes sent and received.
fn usage(tunnel: &Way) -> [f64; 3] {
    let client = reqwest::blocking::Client::builder().no_proxy().build().expect("a client");
    let url = format!("http://{}/metrics", tunnel.prometheus.addr);
    let text = client.get(url).send().and_then(reqwest::blocking::Response::text).expect("an answer");
    let metric = |name: &str| -> f64 {
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        value.unwrap_or_else(|| panic!("no {name} in:\n{text}"))
    };
    [
        metric("baletheus_tunnel_handshakes_total"),
        metric("baletheus_tunnel_bytes_total{direction=\"sent\"}"),
        metric("baletheus_tunnel_bytes_total{direction=\"received\"}"),
    ]
}
