//! One hostile device against the stack's Prometheus: 16 exporters, each with as much as the limits of `prometheus.yml` allow, and
//! all of it new at each scrape. Prometheus has the memory that the stack gives it. Measured: whether it stays alive, and when an
//! alert names the device.
//!
//! By default the device's own tags do not give it more than its fleet has: one exporter. With `OWN_TAGS=all` it has all of its own.
//! `scripts/full hostile` runs it for `MINUTES` (20). `EXPORTERS` (16) and `HONEST` (25) change what it is about. It needs root, for a
//! memory limit by cgroup.

pub mod support {
    pub mod cloud;
    pub mod fleet;
    pub mod odata;
    pub mod recording;
    pub mod sidecar;
    pub mod tools;
    pub mod vpn;
}

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use reqwest::Url;
use reqwest::blocking::Client;
use serde_json::{Value, json};
use support::cloud::{Cloud, KEY};
use support::fleet::gateways;
use support::sidecar::Sidecar;
use support::tools;
use support::vpn::{Device, Vpn};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
/// Below `sample_limit`, and with these values below `body_size_limit`.
const SAMPLES: usize = 1990;
const VALUE_LENGTH: usize = 440;
/// What examples/thingy exports.
const HONEST_SAMPLES: usize = 300;
/// The exporter that the whole fleet has.
const FLEET_PORT: u16 = 9100;
/// Of the exporters that the device gives to itself.
const FIRST_PORT: u16 = 9101;
/// How often the device asks to be scraped.
const INTERVAL: &str = "1m";

fn number(name: &str, default: u64) -> u64 {
    env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is no number")))
}

/// Answers each request with what `body` makes for its number.
fn serve(body: impl Fn(u64) -> String + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let addr = listener.local_addr().expect("its address");
    let count = AtomicU64::new(0);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let _ = answer(&stream, &body(count.fetch_add(1, Ordering::Relaxed))); // whoever asked may be gone
        }
    });
    addr
}

fn answer(mut stream: &TcpStream, body: &str) -> std::io::Result<()> {
    let lines = BufReader::new(stream).lines();
    lines.map_while(Result::ok).take_while(|line| !line.is_empty()).for_each(drop);
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    )?;
    stream.write_all(body.as_bytes())
}

fn hostile(scrape: u64) -> String {
    let mut text = String::new();
    for sample in 0..SAMPLES {
        let value = format!("{scrape}-{sample}-");
        let _ = writeln!(text, "h{{v=\"{value:x<VALUE_LENGTH$}\"}} 1");
    }
    text
}

fn honest(_: u64) -> String {
    (0..HONEST_SAMPLES).fold(String::new(), |mut text, sample| {
        let _ = writeln!(text, "node_figure_{}{{cpu=\"{}\"}} {sample}", sample / 4, sample % 4);
        text
    })
}

/// A group of processes with a limit of memory, by either version of cgroups.
struct Group {
    folder: PathBuf,
    is_v1: bool,
}

impl Group {
    fn new(limit: u64) -> Self {
        let v1 = Path::new("/sys/fs/cgroup/memory");
        let is_v1 = v1.is_dir();
        let root = if is_v1 { v1 } else { Path::new("/sys/fs/cgroup") };
        let folder = root.join(format!("baletheus-hostile-{}", std::process::id()));
        fs::create_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}: this needs root", folder.display()));
        let group = Group { folder, is_v1 };
        let name = if is_v1 { "memory.limit_in_bytes" } else { "memory.max" };
        fs::write(group.folder.join(name), limit.to_string()).expect("a limit of memory");
        group
    }

    fn read(&self, v1: &str, v2: &str) -> u64 {
        let text = fs::read_to_string(self.folder.join(if self.is_v1 { v1 } else { v2 })).unwrap_or_default();
        text.trim().parse().unwrap_or_default()
    }

    /// What the kernel cannot take back: without what it caches of files, in bytes.
    fn own(&self) -> u64 {
        let text = fs::read_to_string(self.folder.join("memory.stat")).unwrap_or_default();
        let name = if self.is_v1 { "rss " } else { "anon " };
        let value = text.lines().find_map(|line| line.strip_prefix(name));
        value.and_then(|value| value.parse().ok()).unwrap_or_default()
    }

    /// The most that was in use, with what the kernel caches of files, in bytes.
    fn peak(&self) -> u64 {
        self.read("memory.max_usage_in_bytes", "memory.peak")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.folder);
    }
}

/// What `docker-compose.yml` gives to Prometheus, in bytes.
fn mem_limit() -> u64 {
    let compose = fs::read_to_string(Path::new(ROOT).join("docker-compose.yml")).expect("the stack");
    let service = compose.split("\n  prometheus:\n").nth(1).expect("the service");
    let limit = service.split("mem_limit: ").nth(1).and_then(|rest| rest.split('m').next()).expect("its limit");
    limit.parse::<u64>().expect("MiB") << 20
}

struct Prometheus {
    child: Child,
    client: Client,
    url: String,
}

impl Prometheus {
    /// By the stack's own entry point, in the group.
    fn start(folder: &Path, group: &Group, port: u16) -> Self {
        let log = fs::File::options().create(true).append(true).open(folder.join("log")).expect("a log");
        let mut command = Command::new("sh");
        command.args(["-c", "echo $$ >\"$1/cgroup.procs\" && shift && exec sh \"$@\"", "sh"]);
        command.arg(&group.folder).arg(Path::new(ROOT).join("packaging/entrypoints/prometheus"));
        command.arg(format!("--web.listen-address=127.0.0.1:{port}"));
        command.env("PROGRAM", tools::prometheus(3).binary).env("ETC", folder.join("etc")).env("TMPDIR", folder);
        command.env("DATA", folder.join("data"));
        let child = command.stdin(Stdio::null()).stdout(log.try_clone().expect("a log")).stderr(log).spawn();
        let client = Client::builder().no_proxy().timeout(Duration::from_secs(20)).build().expect("a client");
        Self { child: child.expect("Prometheus"), client, url: format!("http://127.0.0.1:{port}") }
    }

    fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("its state").is_some()
    }

    fn get(&self, path: &str, query: &[(&str, &str)]) -> Option<Value> {
        let url = Url::parse_with_params(&format!("{}/api/v1/{path}", self.url), query).ok()?;
        serde_json::from_str(&self.client.get(url).send().ok()?.text().ok()?).ok()
    }

    fn value(&self, query: &str) -> f64 {
        let answer = self.get("query", &[("query", query)]).unwrap_or_default();
        answer["data"]["result"][0]["value"][1].as_str().and_then(|text| text.parse().ok()).unwrap_or(f64::NAN)
    }

    /// The state of the alert on new series that names this device.
    fn alert(&self, device: &str) -> Option<String> {
        let answer = self.get("alerts", &[])?;
        let alert = answer["data"]["alerts"]
            .as_array()?
            .iter()
            .find(|alert| alert["labels"]["alertname"] == "SeriesChurn" && alert["labels"]["device_name"] == device)?;
        alert["state"].as_str().map(str::to_owned)
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A device of the fleet, and one whose tags name its exporters.
fn fleet(honest: u64, exporters: u16) -> Vec<Value> {
    let mut devices = gateways(honest + 1);
    let ports: Vec<_> = (0..exporters).map(|at| format!("e{at}:{}", FIRST_PORT + at)).collect();
    let hostile = devices.last_mut().expect("a device");
    hostile["device_name"] = json!("hostile");
    hostile["device_tag"] = json!([
        { "tag_key": "prometheus.io/exporters", "value": ports.join(",") },
        { "tag_key": "prometheus.io/interval", "value": INTERVAL },
        { "tag_key": "prometheus.io/alert", "value": "false" },
    ]);
    devices
}

/// The stack's configuration with the addresses of this machine.
fn configure(folder: &Path, sidecar: &Sidecar, status: &str, tunnel: &str) {
    let config = include_str!("../prometheus.yml")
        .replace("/etc/prometheus/alerts", &format!("{ROOT}/alerts"))
        .replace("/targets/balena.json", sidecar.path("balena.json").to_str().expect("a path"))
        .replace("http://tunnel:9798", tunnel)
        .replace("tunnel:9798", tunnel.trim_start_matches("http://"))
        .replace("baletheus:9797", status);
    fs::create_dir(folder.join("etc"))
        .and_then(|()| fs::write(folder.join("etc/prometheus.yml"), config))
        .expect("written");
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port()
}

#[test]
#[ignore = "it takes as long as it is told to, and needs root"]
fn one_hostile_device_does_not_end_prometheus() {
    let own_tags = env::var("OWN_TAGS").unwrap_or_else(|_| "narrow".into());
    let (minutes, honest_devices) = (number("MINUTES", 20), number("HONEST", 25));
    let exporters = u16::try_from(number("EXPORTERS", 16)).expect("a few");
    let _ = rustls::crypto::ring::default_provider().install_default();
    let cloud = Cloud::start(fleet(honest_devices, exporters));
    let (good, bad) = (serve(honest), serve(hostile));
    let hostile_uuid = format!("{:032x}", honest_devices + 1);
    let vpn = Vpn::start_with(KEY, move |uuid| {
        let mut device = Device::default();
        let is_hostile = uuid == hostile_uuid;
        device.ports.insert(FLEET_PORT, if is_hostile { bad } else { good });
        device.ports.extend((0..exporters).filter(|_| is_hostile).map(|at| (FIRST_PORT + at, bad)));
        Some(device)
    });
    let status = format!("127.0.0.1:{}", free_port());
    let sidecar = Sidecar::of(env!("CARGO_BIN_EXE_baletheus"), &cloud)
        .env("EXPORTERS", format!("node:{FLEET_PORT}"))
        .env("OWN_TAGS", &*own_tags)
        .env("REFRESH_RATE", "30s")
        .env("LISTEN_ADDRESS", &*status);
    let running = sidecar.start();
    running.wait_for("updated balena.json");
    let (_tunnel, tunnel) = sidecar.tunnel(&vpn.url());
    let folder = tempfile::tempdir().expect("a folder");
    configure(folder.path(), &sidecar, &status, &tunnel);

    let (limit, port) = (mem_limit(), free_port());
    let group = Group::new(limit);
    let mut prometheus = Prometheus::start(folder.path(), &group, port);
    let start = Instant::now();
    let (mut ended, mut named, mut own) = (0, None, 0);
    println!(
        "limit {} MiB, {honest_devices} honest devices, a hostile one with {exporters} exporters, OWN_TAGS={own_tags}",
        limit >> 20
    );
    for minute in 1..=minutes {
        while start.elapsed() < Duration::from_secs(60 * minute) {
            thread::sleep(Duration::from_secs(1));
            own = own.max(group.own());
            if prometheus.has_ended() {
                ended += 1;
                println!("{:>5} s: Prometheus has ended, time {ended}", start.elapsed().as_secs());
                prometheus = Prometheus::start(folder.path(), &group, port);
            }
            if named.is_none() && prometheus.alert("hostile").as_deref() == Some("firing") {
                named = Some(start.elapsed().as_secs());
                println!("{:>5} s: SeriesChurn names the device", start.elapsed().as_secs());
            }
        }
        cloud.clear_requests();
        vpn.clear_requests();
        let up = prometheus.value("count(up{device_name=~\"gw-.*\"} == 1)");
        let rejected = prometheus.value("count(up{device_name=\"hostile\"} == 0)");
        let series = prometheus.get("status/tsdb", &[]).unwrap_or_default()["data"]["headStats"]["numSeries"].take();
        let (most, peak) = (own >> 20, group.peak() >> 20);
        println!(
            "{minute:>3} min: {series} series, at most {most} MiB, with files {peak} MiB, honest up {up}, hostile refused {rejected}"
        );
    }
    assert!(named.is_some() || minutes < 15, "no alert names the device");
    if own_tags == "all" {
        println!("Prometheus ended {ended} times");
        return;
    }
    assert_eq!(ended, 0, "Prometheus ended {ended} times:\n{}", fs::read_to_string(folder.path().join("log")).unwrap());
}
