//! The recipe of docs/shards-openbalena.md: 5,000 devices shared by two members, each with its own tunnel, which write to one `VictoriaMetrics`.
//! No device is lost, and none is scraped twice, before and after a new release. Members are vmagent, or Prometheus as an agent.
//!
//! `scripts/full vmagent` runs it in some minutes and prints figures.

pub mod support {
    pub mod cloud;
    pub mod exporter;
    pub mod fleet;
    pub mod odata;
    pub mod recording;
    pub mod sidecar;
    pub mod tools;
    pub mod vpn;
}

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use reqwest::Url;
use reqwest::blocking::Client;
use serde_json::Value;
use support::cloud::Cloud;
use support::exporter::Exporters;
use support::fleet::{gateways, set_release};
use support::sidecar::Sidecar;
use support::tools;

const DEVICES: u64 = 5000;
const MEMBERS: usize = 2;
/// More than two scrapes and a refresh of the list.
const PATIENCE: Duration = Duration::from_secs(240);

/// What shares the devices.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Vmagent,
    /// Prometheus of this major version.
    Agent(u8),
}

/// A program that ends with the value, and its log.
struct Server {
    child: Child,
    log: PathBuf,
}

impl Server {
    fn start(program: &Path, args: &[String], log: PathBuf) -> Self {
        let file = fs::File::create(&log).unwrap();
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file);
        let child = command.spawn().unwrap_or_else(|error| {
            panic!("{}: {error}: run `scripts/lib/tools stack`, or put the program there", program.display())
        });
        Server { child, log }
    }

    /// Its peak memory in MiB and its CPU time in seconds.
    fn costs(&self) -> (u64, f64) {
        let id = self.child.id();
        costs(id)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn costs(id: u32) -> (u64, f64) {
    let status = fs::read_to_string(format!("/proc/{id}/status")).expect("it runs");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    let kib: u64 = peak.trim().trim_end_matches(" kB").parse().expect("KiB");
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).expect("it runs");
    let fields: Vec<_> = stat.rsplit_once(')').expect("a name").1.split_whitespace().collect();
    let ticks: u32 = [fields[11], fields[12]].iter().map(|ticks| ticks.parse::<u32>().expect("ticks")).sum();
    (kib >> 10, f64::from(ticks) / 100.0)
}

fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port").to_string()
}

fn tool(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/victoria_metrics").join(name)
}

/// The configuration of a member in the document, for another member, with the list and the tunnel of this test.
fn example(member: usize, list: &str, tunnel: &str) -> String {
    let document = include_str!("../docs/shards-openbalena.md");
    let (_, section) = document.split_once("\n## vmagent").expect("the section");
    let (_, block) = section.split_once("```yaml\n").expect("the example");
    let mut config = block.split("```").next().unwrap().to_owned();
    let number = format!("'{member}'");
    for (from, to, times) in
        [("'0'", number.as_str(), 2), ("http://baletheus:9797/targets", list, 1), ("http://tunnel:9798", tunnel, 1)]
    {
        assert_eq!(config.matches(from).count(), times, "{from} in\n{config}");
        config = config.replace(from, to);
    }
    config
}

fn member(kind: Kind, number: usize, config: &str, write: &str, folder: &Path) -> Server {
    let [path, data, log] = ["yml", "data", "log"].map(|end| folder.join(format!("member-{number}.{end}")));
    match kind {
        Kind::Vmagent => {
            fs::write(&path, config).unwrap();
            let args = [
                format!("-promscrape.config={}", path.display()),
                format!("-remoteWrite.url={write}"),
                format!("-remoteWrite.tmpDataPath={}", data.display()),
                "-promscrape.maxScrapeSize=16MB".into(),
                "-promscrape.disableKeepAlive".into(),
                format!("-httpListenAddr={}", free_address()),
            ];
            Server::start(&tool("vmagent"), &args, log)
        }
        Kind::Agent(major) => {
            fs::write(&path, format!("{config}remote_write:\n  - url: {write}\n")).unwrap();
            let agent = if major == 2 { "--enable-feature=agent" } else { "--agent" };
            let args = [
                agent.to_owned(),
                format!("--config.file={}", path.display()),
                format!("--storage.agent.path={}", data.display()),
                format!("--web.listen-address={}", free_address()),
            ];
            Server::start(&tools::prometheus(major).binary, &args, log)
        }
    }
}

struct Backend {
    _server: Server,
    url: String,
    client: Client,
}

impl Backend {
    fn start(folder: &Path) -> Self {
        let address = free_address();
        let args = [
            format!("-storageDataPath={}", folder.join("storage").display()),
            format!("-httpListenAddr={address}"),
            "-search.latencyOffset=0s".into(),
            // A group for each device, and several queries.
            "-search.maxUniqueTimeseries=1000000".into(),
        ];
        let server = Server::start(&tools::victoria_metrics(), &args, folder.join("backend.log"));
        let client = Client::builder().no_proxy().timeout(Duration::from_secs(60)).build().unwrap();
        Backend { _server: server, url: format!("http://{address}"), client }
    }

    /// The value of a query for one number; 0 if there is nothing to count.
    fn number(&self, promql: &str) -> Option<f64> {
        let url = Url::parse_with_params(&format!("{}/api/v1/query", self.url), [("query", promql)]).unwrap();
        let answer: Value = serde_json::from_str(&self.client.get(url).send().ok()?.text().ok()?).ok()?;
        let result = answer["data"]["result"].as_array()?;
        result.first().map_or(Some(0.0), |series| series["value"][1].as_str()?.parse().ok())
    }

    fn expect(&self, promql: &str, expected: f64, servers: &[Server]) -> Duration {
        let (start, mut last) = (Instant::now(), None);
        while start.elapsed() < PATIENCE {
            last = self.number(promql);
            if last == Some(expected) {
                return start.elapsed();
            }
            thread::sleep(Duration::from_secs(1));
        }
        let logs = servers.iter().map(|server| fs::read_to_string(&server.log).unwrap_or_default());
        let logs: Vec<_> = logs.map(|log| log.lines().rev().take(10).collect::<Vec<_>>().join("\n")).collect();
        panic!("{promql} is {last:?} and not {expected}\n{}", logs.join("\n\n"));
    }
}

#[expect(clippy::cast_precision_loss)] // of small numbers
fn two_members_share_the_devices(kind: Kind) {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let cloud = Arc::new(Cloud::start(gateways(DEVICES)));
    let exporters = Exporters::start(&cloud);
    let sidecar = Sidecar::of(env!("CARGO_BIN_EXE_baletheus"), &cloud)
        .env("LISTEN_ADDRESS", "127.0.0.1:0")
        .env("EXPORTERS", "node:80")
        .env("REFRESH_RATE", "5s");
    let discovery = sidecar.start();
    let line = discovery.wait_for("status on http://");
    let list = format!("http://{}/targets", line.rsplit_once("http://").unwrap().1);
    discovery.wait_for("updated balena.json");
    let tunnels: Vec<_> = (0..MEMBERS).map(|_| sidecar.tunnel(&exporters.vpn.url())).collect();
    let backend = Backend::start(sidecar.dir.path());
    let write = format!("{}/api/v1/write", backend.url);
    let servers: Vec<_> = tunnels
        .iter()
        .enumerate()
        .map(|(number, (_, proxy))| member(kind, number, &example(number, &list, proxy), &write, sidecar.dir.path()))
        .collect();

    let all = DEVICES as f64;
    let took = backend.expect("count(count by (uuid) (last_over_time(up{job=\"node\"}[10m]) == 1))", all, &servers);
    println!("{kind:?}: each of {DEVICES} devices answered within {} s", took.as_secs());
    let twice = "count(count by (uuid) (count by (uuid, member) (last_over_time(up{job=\"node\"}[1h]))) > 1)";
    assert_eq!(backend.number(twice), Some(0.0), "devices that both members scrape");
    exporters.clear_requests();

    // Another release is another value of the label commit, and so another series.
    cloud.change(|devices| devices.iter_mut().for_each(|device| set_release(device, "2.0.0")));
    discovery.wait_for_lines("updated balena.json", 2);
    let updated = "count(count by (uuid) (last_over_time(up{job=\"node\",commit!=\"c0ffee\"}[10m]) == 1))";
    let took = backend.expect(updated, all, &servers);
    println!("{kind:?}: each of them answered under its new release within {} s", took.as_secs());
    assert_eq!(backend.number(twice), Some(0.0), "devices that both members scrape");
    let failed = "count(min by (uuid) (min_over_time(up{job=\"node\"}[1h])) == 0)";
    assert_eq!(backend.number(failed), Some(0.0), "devices with a scrape that failed");

    for number in 0..MEMBERS {
        let devices = backend.number(&format!("count(count by (uuid) (up{{job=\"node\",member=\"{number}\"}}))"));
        println!("{kind:?}: member {number} has {devices:?} devices");
        let (peak, cpu) = servers[number].costs();
        println!("{kind:?}: member {number}: peak {peak} MiB, {cpu} s of CPU");
        let (peak, cpu) = costs(tunnels[number].0.id());
        println!("{kind:?}: its tunnel: peak {peak} MiB, {cpu} s of CPU");
    }
}

#[test]
#[ignore = "takes minutes: scripts/full vmagent"]
fn two_vmagents_share_the_devices() {
    two_members_share_the_devices(Kind::Vmagent);
}

#[test]
#[ignore = "takes minutes: scripts/full vmagent"]
fn two_agents_of_prometheus_2_share_the_devices() {
    two_members_share_the_devices(Kind::Agent(2));
}

#[test]
#[ignore = "takes minutes: scripts/full vmagent"]
fn two_agents_of_prometheus_3_share_the_devices() {
    two_members_share_the_devices(Kind::Agent(3));
}
