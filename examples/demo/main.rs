//! A simulated balenaCloud with 25 devices, one of which fails, the real sidecar and tunnel beside it, and Prometheus if it is installed.
//! Run it with `cargo run --example demo`. Nothing leaves this machine.

#[path = "../../tests/support"]
pub mod support {
    pub mod cloud;
    pub mod exporter;
    pub mod fleet;
    pub mod odata;
    pub mod prometheus;
    pub mod recording;
    pub mod sidecar;
    pub mod tools;
    pub mod vpn;
}

use std::env;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use support::cloud::{Cloud, KEY};
use support::exporter::Exporters;
use support::fleet::{declare_exporters, demo_fleet, find, set_release, sibling};
use support::prometheus::{Prometheus, loopback_config};
use support::sidecar::Sidecar;
use support::tools;

/// The time between two events in the fleet.
const PACE: Duration = Duration::from_secs(10);
/// The same with `--serve`, where Prometheus scrapes once a minute.
const SERVE_PACE: Duration = Duration::from_secs(180);
const API_PORT: u16 = 8080;
const VPN_PORT: u16 = 3128;
/// The limit for the first list, on a busy machine.
const FIRST_LIST_TIMEOUT: Duration = Duration::from_secs(30);
/// Without a new line for this time, the log of the start is complete.
const LOG_PAUSE: Duration = Duration::from_millis(300);
/// The device whose exporter does not run.
const BROKEN: &str = "freezer-01";
/// Nobody listens there: only root could.
const NOBODY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 1);

fn main() -> ExitCode {
    let arguments: Vec<_> = env::args().skip(1).collect();
    if arguments == ["--serve"] {
        return serve();
    }
    let seconds = match arguments.as_slice() {
        [] => Some(u64::MAX),
        [option, seconds] if option == "--seconds" => seconds.parse().ok(),
        _ => None,
    };
    let Some(seconds) = seconds else {
        eprintln!("usage: cargo run --example demo [-- --seconds N | -- --serve]");
        return ExitCode::from(2);
    };
    println!(
        "demo: a simulated balenaCloud with 25 devices, and the real baletheus beside it. The exporter of {BROKEN} does not run"
    );
    // Built with the example, so that the dependencies keep the features that they were built with.
    let build = tools::cargo("build").args(["--quiet", "--bin", "baletheus", "--example", "demo"]).status();
    if !build.is_ok_and(|status| status.success()) {
        eprintln!("demo: cargo cannot build baletheus");
        return ExitCode::FAILURE;
    }
    run(Duration::from_secs(seconds))
}

/// Only the simulated balenaCloud and its VPN, for the services of examples/demo/docker-compose.yml.
fn serve() -> ExitCode {
    let signals = signals();
    let cloud = Arc::new(Cloud::start_at(([0, 0, 0, 0], API_PORT).into(), demo_fleet()));
    declare_exporters(&cloud);
    let exporters = Exporters::start_at(([0, 0, 0, 0], VPN_PORT).into(), &cloud);
    break_one(&cloud, &exporters);
    println!("demo: a simulated balenaCloud with 25 devices, at ports {API_PORT} (API) and {VPN_PORT} (VPN proxy)");
    for step in 0.. {
        if signals.recv_timeout(SERVE_PACE) != Err(RecvTimeoutError::Timeout) {
            break;
        }
        println!("demo: {}", cloud.change(|devices| happen(step, devices)));
        declare_exporters(&cloud);
        cloud.clear_requests();
        exporters.clear_requests();
    }
    ExitCode::SUCCESS
}

/// So that there is something to find.
fn break_one(cloud: &Cloud, exporters: &Exporters) {
    let uuid = cloud.change(|devices| find(devices, BROKEN)["uuid"].as_str().unwrap_or_default().to_owned());
    exporters.forward(&uuid, NOBODY);
}

fn run(length: Duration) -> ExitCode {
    let start = Instant::now();
    let signals = signals();
    let cloud = Arc::new(Cloud::start(demo_fleet()));
    declare_exporters(&cloud);
    let exporters = Exporters::start(&cloud);
    break_one(&cloud, &exporters);
    let sidecar = Sidecar::of(tools::built().join("baletheus"), &cloud).env("REFRESH_RATE", "2s");
    let sidecar = sidecar.env("EXPORTERS", "none").env("OWN_TAGS", "all").env("LISTEN_ADDRESS", "127.0.0.1:0");
    let sidecar = sidecar.env("DEVICE_REFRESH_RATE", "2s").env("DEVICE_METRICS", "true");
    let (mut baletheus, log) = Beside::start(sidecar.command());
    let (_tunnel, proxy) = sidecar.tunnel(&exporters.vpn.url());
    let Some(status) = first_list(&log) else {
        eprintln!("demo: baletheus writes no list");
        return ExitCode::FAILURE;
    };
    let config = sidecar.path("prometheus.yml");
    fs::write(&config, loopback_config(&proxy, &status)).expect("a configuration for Prometheus");
    let prometheus = [3, 2].into_iter().find(|major| tools::find_prometheus(*major).is_some());
    let prometheus = prometheus.map(|major| (major, Prometheus::start(major, &config)));
    while log.recv_timeout(LOG_PAUSE).is_ok() {}
    let list = sidecar.path("balena.json");
    println!("demo: open {status}/ for the devices, their states and targets");
    if let Some((major, prometheus)) = &prometheus {
        show(*major, prometheus);
    } else {
        println!(
            "demo: no Prometheus is in target/tools or on the PATH to scrape them: `scripts/test tools` gets it, without root"
        );
    }
    println!("demo: the target file is {0}; see it with: jq . {0}", list.display());
    println!("demo: scrape a device through the tunnel: curl -x {proxy} http://{}.balena/metrics", uuid(&cloud));
    println!(
        "demo: try each target, and see why one does not answer: API_KEY={KEY} \
         NO_PROXY='*' '{}' check --api-url {} --tunnel-url {} --exporter none --own-tags all",
        tools::built().join("baletheus").display(),
        cloud.url(),
        exporters.vpn.url()
    );
    println!("demo: Ctrl-C ends all of it");

    for step in 0.. {
        let pause = PACE.min(length.saturating_sub(start.elapsed()));
        match signals.recv_timeout(pause) {
            Err(RecvTimeoutError::Timeout) if start.elapsed() < length => {}
            _ => break,
        }
        if let Ok(Some(status)) = baletheus.0.try_wait() {
            // Ctrl-C in a terminal goes to both programs, and may arrive here a moment later.
            if signals.recv_timeout(Duration::from_secs(1)).is_ok() {
                break;
            }
            eprintln!("demo: baletheus ended by itself, with {status}");
            return ExitCode::FAILURE;
        }
        println!("demo: {}", cloud.change(|devices| happen(step, devices)));
        declare_exporters(&cloud);
        // The simulated servers keep their requests for tests.
        cloud.clear_requests();
        exporters.clear_requests();
    }
    println!("demo: the end");
    ExitCode::SUCCESS
}

/// Waits for the first list in the log of baletheus, and returns the URL of its status endpoint.
fn first_list(log: &Receiver<String>) -> Option<String> {
    let deadline = Instant::now() + FIRST_LIST_TIMEOUT;
    let mut status = None;
    loop {
        let line = log.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok()?;
        if let Some((_, url)) = line.split_once("status on ") {
            status = Some(url.to_owned());
        }
        if line.contains("updated balena.json") {
            return status;
        }
    }
}

/// Debian's Prometheus has no web interface.
fn show(major: u8, prometheus: &Prometheus) {
    let url = prometheus.url();
    if prometheus.has_web_interface() {
        println!("demo: open {url}/targets for the targets of Prometheus {major}");
        println!("demo: open {url}/graph?g0.expr=node_load1&g0.tab=0&g0.range_input=15m for the load of each device");
    } else {
        println!(
            "demo: Prometheus {major} has no web interface here; ask it: curl '{url}/api/v1/query?query=node_load1'"
        );
    }
}

/// Changes the fleet: five kinds of events in turn. Returns a sentence about the event.
fn happen(step: usize, devices: &mut Vec<Value>) -> String {
    let round = step / 5;
    let guest = format!("fridge-{:02}", 10 + round);
    let steady = (7 * round + 3) % 25; // never the index of a guest
    let device = &mut devices[steady];
    let name = device["device_name"].as_str().unwrap_or_default().to_owned();
    match step % 5 {
        0 => {
            let version = format!("5.0.{round}");
            set_release(device, &version);
            format!("{name} now runs release {version}, whose docker-compose.yml declares one exporter more")
        }
        1 => {
            let like = find(devices, "fridge-01").clone();
            devices.push(sibling(&like, 9_311_000 + round as u64, &guest));
            format!("{guest} is new")
        }
        2 => {
            device["is_connected_to_vpn"] = json!(false);
            format!("{name} goes offline: it stays a target, since that is when its `up` of 0 is of use")
        }
        3 => {
            device["is_connected_to_vpn"] = json!(true);
            format!("{name} is online again")
        }
        _ => {
            devices.retain(|device| device["device_name"] != *guest);
            format!("{guest} is removed")
        }
    }
}

fn uuid(cloud: &Cloud) -> String {
    cloud.change(|devices| devices[0]["uuid"].as_str().unwrap_or_default().to_owned())
}

fn signals() -> Receiver<i32> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).expect("signals");
    let (sender, receiver) = channel();
    thread::spawn(move || signals.forever().try_for_each(|signal| sender.send(signal)));
    receiver
}

/// A child process. Dropping it sends SIGTERM, and kills it after 5 s.
struct Beside(Child);

impl Beside {
    /// Starts it. Its log goes to standard error and to the receiver, line by line.
    fn start(mut command: Command) -> (Self, Receiver<String>) {
        let mut child = command.stderr(Stdio::piped()).spawn().expect("baletheus runs");
        let log = child.stderr.take().expect("a pipe");
        let (sender, receiver) = channel();
        thread::spawn(move || {
            for line in BufReader::new(log).lines().map_while(Result::ok) {
                eprintln!("{line}");
                let _ = sender.send(line); // nobody listens after the start
            }
        });
        (Beside(child), receiver)
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(5);
        if matches!(self.0.try_wait(), Ok(None)) {
            let _ = Command::new("kill").arg(self.0.id().to_string()).status();
        }
        while matches!(self.0.try_wait(), Ok(None)) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
