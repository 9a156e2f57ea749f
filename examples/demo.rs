//! A simulated balenaCloud with 25 devices, the real sidecar and tunnel beside it, and Prometheus if it is installed.
//! Run it with `cargo run --example demo`. Nothing leaves this machine.

#[path = "../tests/support"]
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
use std::process::{Child, Command, ExitCode};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use support::cloud::Cloud;
use support::exporter::Exporters;
use support::fleet::{declare_exporters, demo_fleet, find, set_release, sibling};
use support::prometheus::{Prometheus, project_config};
use support::sidecar::Sidecar;
use support::tools;

/// The time between two events in the fleet.
const PACE: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let seconds = match env::args().skip(1).collect::<Vec<_>>().as_slice() {
        [] => Some(u64::MAX),
        [option, seconds] if option == "--seconds" => seconds.parse().ok(),
        _ => None,
    };
    let Some(seconds) = seconds else {
        eprintln!("usage: cargo run --example demo [-- --seconds N]");
        return ExitCode::from(2);
    };
    println!("demo: a simulated balenaCloud with 25 devices, an exporter on each, and the real baletheus beside it");
    // Built with the example, so that the dependencies keep the features that they were built with.
    let build = tools::cargo("build").args(["--quiet", "--bin", "baletheus", "--example", "demo"]).status();
    if !build.is_ok_and(|status| status.success()) {
        eprintln!("demo: cargo cannot build baletheus");
        return ExitCode::FAILURE;
    }
    run(Duration::from_secs(seconds))
}

fn run(length: Duration) -> ExitCode {
    let (start, signals) = (Instant::now(), signals());
    let cloud = Arc::new(Cloud::start(demo_fleet()));
    declare_exporters(&cloud);
    let exporters = Exporters::start(&cloud);
    let sidecar = Sidecar::of(tools::built().join("baletheus"), &cloud)
        .env("REFRESH_RATE", "2s")
        .env("EXPORTERS", "none")
        .env("OWN_TAGS", "all");
    let (list, config) = (sidecar.path("balena.json"), sidecar.path("prometheus.yml"));
    println!("demo: the target file is {0}; see it with: jq . {0}", list.display());
    let mut baletheus = Beside(sidecar.command().spawn().expect("baletheus runs"));
    let (_tunnel, proxy) = sidecar.tunnel(&exporters.vpn.url());
    fs::write(&config, project_config(&proxy)).expect("a configuration for Prometheus");
    println!(
        "demo: a device is reached through the tunnel with: curl -x {proxy} http://{}.balena/metrics",
        uuid(&cloud)
    );
    println!("demo: Ctrl-C ends all of it");

    let prometheus = [3, 2].into_iter().find(|major| tools::find_prometheus(*major).is_some());
    let prometheus = prometheus.map(|major| (major, Prometheus::start(major, &config)));
    match &prometheus {
        Some((major, prometheus)) => {
            let url = prometheus.url();
            println!("demo: Prometheus {major} shows the devices at {url}/targets");
            println!("demo: and the load of each at {url}/graph?g0.expr=node_load1&g0.tab=0&g0.range_input=15m");
        }
        None => println!("demo: there is no Prometheus here to show them: `scripts/test tools` gets it, without root"),
    }

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
            device["is_online"] = json!(false);
            format!("{name} goes offline: it stays a target, since that is when its `up` of 0 is of use")
        }
        3 => {
            device["is_online"] = json!(true);
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
