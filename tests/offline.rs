//! `examples/often-offline`: Prometheus in agent mode on a device, through an outage of the network, and what the backend has
//! afterwards. `scripts/full offline` runs it: a minute for an hour. With `INTERVAL=60`, a scrape each minute, it takes the hour.

pub mod support {
    pub mod alerts;
    pub mod cloud;
    pub mod grafana;
    pub mod node_exporter;
    pub mod odata;
    pub mod raspberry;
    pub mod recording;
    pub mod sidecar;
    pub mod tools;
}

use std::env;
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use reqwest::blocking::Client;
use serde_json::Value;
use support::node_exporter::flags_of;
use support::sidecar::{PATIENCE, Running};
use support::{raspberry, tools};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const UUID: &str = "0123456789abcdef0123456789abcdef";
/// Scrapes while there is no network.
const OUTAGE: u32 = 60;

/// Between two scrapes.
fn interval() -> Duration {
    let seconds = env::var("INTERVAL").map_or(1, |seconds| seconds.parse().expect("INTERVAL is a number of seconds"));
    Duration::from_secs(seconds)
}

fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port")
}

/// The backend, with its samples in `folder`.
fn backend(folder: &Path, address: SocketAddr) -> Running {
    let mut command = Command::new(tools::victoria_metrics());
    command.arg(format!("-httpListenAddr={address}")).arg(format!("-storageDataPath={}", folder.display()));
    let running = Running::spawn(command);
    running.wait_for("starting http server at");
    running
}

/// The agent, as its container starts it.
fn agent(folder: &Path, own: SocketAddr, exporter: SocketAddr, backend: SocketAddr) -> Running {
    let example = Path::new(ROOT).join("examples/often-offline");
    let config = fs::read_to_string(example.join("prometheus.yml")).expect("the configuration");
    let config = config
        .replace("scrape_interval: 60s", &format!("scrape_interval: {}s", interval().as_secs()))
        .replace("127.0.0.1:9100", &exporter.to_string());
    fs::create_dir(folder.join("etc"))
        .and_then(|()| fs::write(folder.join("etc/prometheus.yml"), config))
        .expect("written");
    let compose: Value = support::alerts::read(&example.join("docker-compose.yml"));
    let arguments = compose["services"]["prometheus"]["command"].as_array().expect("its arguments");
    let arguments = arguments.iter().map(|argument| argument.as_str().expect("text"));
    let prometheus = tools::prometheus(3);
    let mut command = Command::new("sh");
    command.arg(Path::new(ROOT).join("packaging/entrypoints/prometheus"));
    command.args(arguments.filter(|argument| !argument.starts_with("--web.")));
    command.arg(format!("--web.listen-address={own}"));
    command.env("PROGRAM", prometheus.binary).env("PROMTOOL", prometheus.promtool).env("TMPDIR", folder);
    command.env("ETC", folder.join("etc")).env("DATA", folder.join("data"));
    command.env("REMOTE_WRITE_URL", format!("http://{backend}/api/v1/write"));
    command.env("BALENA_DEVICE_UUID", UUID).env("BALENA_DEVICE_NAME_AT_INIT", "van \"7\"");
    Running::spawn(command)
}

/// When the backend has a sample of the device's load, in milliseconds, and the labels of that series.
fn samples(client: &Client, backend: SocketAddr) -> (Vec<u64>, Value) {
    let url = format!("http://{backend}/api/v1/export?match[]=node_load1");
    let answer = client.get(url).send().and_then(|answer| answer.text()).unwrap_or_default();
    let lines: Vec<Value> = answer.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let times = lines.iter().flat_map(|line| line["timestamps"].as_array().expect("times"));
    let mut times: Vec<u64> = times.map(|time| time.as_u64().expect("a time")).collect();
    times.sort_unstable();
    (times, lines.into_iter().next().unwrap_or_default()["metric"].take())
}

fn wait_for(client: &Client, backend: SocketAddr, count: usize) -> (Vec<u64>, Value) {
    let deadline = Instant::now() + PATIENCE + 5 * interval();
    loop {
        let found = samples(client, backend);
        if found.0.len() >= count {
            return found;
        }
        assert!(Instant::now() < deadline, "of {count} samples came {}", found.0.len());
        thread::sleep(Duration::from_millis(200));
    }
}

/// What the agent took of the device.
fn report(client: &Client, agent: &Running, address: SocketAddr, start: Instant) {
    let of = |file: &str, name: &str| {
        let text = fs::read_to_string(format!("/proc/{}/{file}", agent.id())).expect("it runs");
        text.lines().find(|line| line.starts_with(name)).expect("a field").to_owned()
    };
    println!("{} s: {}, {}", start.elapsed().as_secs(), of("status", "VmHWM"), of("io", "write_bytes"));
    let metrics = client.get(format!("http://{address}/metrics")).send().and_then(|answer| answer.text());
    let names =
        ["process_cpu_seconds_total", "prometheus_remote_storage_bytes_total", "prometheus_agent_samples_appended"];
    for line in metrics.expect("its metrics").lines().filter(|line| names.iter().any(|name| line.starts_with(name))) {
        println!("{line}");
    }
}

#[test]
#[ignore = "needs VictoriaMetrics: scripts/full offline"]
fn samples_of_an_outage_come_afterwards() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = Client::builder().no_proxy().build().expect("a client");
    let folder = tempfile::tempdir().expect("a folder");
    let flags = flags_of("examples/often-offline/docker-compose.yml");
    let (_exporter, exporter) = raspberry::start(&folder.path().join("board"), &flags);
    let (address, data) = (free(), folder.path().join("backend"));
    let running = backend(&data, address);
    let (own, start) = (free(), Instant::now());
    let agent = agent(folder.path(), own, exporter, address);
    let before = wait_for(&client, address, 3).0.len();

    running.signal("TERM"); // it writes what it has
    running.wait();
    agent.wait_for("Failed to send batch, retrying");
    thread::sleep(OUTAGE * interval());
    report(&client, &agent, own, start);
    let _running = backend(&data, address);
    let (times, labels) = wait_for(&client, address, before + OUTAGE as usize);
    report(&client, &agent, own, start);

    let gap = times.windows(2).map(|pair| pair[1] - pair[0]).max().expect("many samples");
    let most = interval() + Duration::from_secs(4);
    assert!(Duration::from_millis(gap) < most, "{gap} ms without a sample: {times:?}");
    assert_eq!(
        (&labels["uuid"], &labels["device_name"], &labels["job"]),
        (&UUID.into(), &"van \"7\"".into(), &"node".into())
    );
}
