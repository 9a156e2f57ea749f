//! The memory limit of the compose file holds for as many devices as it is meant for. A program by itself: it takes a core for
//! a while. A cgroup needs root: for other users the resident memory is measured, and no limit is set.

#[path = "support"]
pub mod support {
    pub mod binary;
    pub mod cloud;
    pub mod fleet;
    pub mod odata;
    pub mod recording;
    pub mod sidecar;
    pub mod status;
}

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;

use flate2::read::GzDecoder;
use serde_json::json;

use support::binary::sidecar;
use support::cloud::{Cloud, Reply};
use support::fleet::{many, running_release, set_target};
use support::status::Status;

/// The limit of the service `baletheus` in docker-compose.yml, in MiB.
const LIMIT: u64 = 64;
/// Devices for which it holds.
const DEVICES: u64 = 20_000;
/// Scrapes of each of two scrapers.
const SCRAPES: usize = 3;

/// Services of each device in an update.
const SERVICES: u64 = 7;

/// One test at a time: each keeps both cores busy.
static TURN: Mutex<()> = Mutex::new(());

/// A cgroup with a memory limit and no swap, of version 1 or 2.
struct Cgroup(PathBuf);

impl Cgroup {
    /// None if the user may not make one.
    fn new(name: &str, mib: u64) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("no limit is set: a cgroup needs root");
            return None;
        }
        let name = format!("baletheus-{name}-{}", std::process::id());
        let first = Path::new("/sys/fs/cgroup/memory");
        let (top, file, swap) = if first.is_dir() {
            (first, "memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
        } else {
            (Path::new("/sys/fs/cgroup"), "memory.max", "memory.swap.max")
        };
        let group = Cgroup(top.join(name));
        let limit = (mib << 20).to_string();
        let made = fs::create_dir(&group.0).and_then(|()| fs::write(group.0.join(file), &limit));
        made.unwrap_or_else(|error| {
            panic!("cannot make the cgroup {}: {error}; run this test where cgroups can be written", group.0.display())
        });
        // A kernel without accounting of swap has no such file.
        let _ = fs::write(group.0.join(swap), if first.is_dir() { &limit } else { "0" });
        Some(group)
    }

    /// The most memory that was charged to it, in MiB, the kernel's part for files and sockets included.
    fn peak(&self) -> u64 {
        let read = |file: &str| fs::read_to_string(self.0.join(file)).ok()?.trim().parse::<u64>().ok();
        read("memory.max_usage_in_bytes").or_else(|| read("memory.peak")).map_or(0, |peak| peak >> 20)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0); // a process may still be in it if the test failed
    }
}

#[test]
fn the_limit_of_the_compose_file_holds_with_two_scrapers_and_a_list_that_changes() {
    let compose = include_str!("../docker-compose.yml");
    let service = compose.split_once("\n  baletheus:\n").expect("the service").1.split_once("\n\n").expect("its end").0;
    let comment = format!("# Holds for {},000 devices", DEVICES / 1000);
    assert!(service.contains(&format!("mem_limit: {LIMIT}m")) && service.contains(&comment), "{service}");

    let cloud = Cloud::start(many(DEVICES));
    limit_holds(&cloud, [("balena_device_memory_used_bytes{", DEVICES), ("balena_device_services_running{", DEVICES)]);
}

#[test]
#[ignore = "takes minutes: scripts/full memory"]
fn the_limit_of_the_compose_file_holds_while_the_whole_fleet_downloads_a_release() {
    let cloud = Cloud::start(many(DEVICES));
    update(&cloud);
    let all = SERVICES * DEVICES;
    limit_holds(
        &cloud,
        [("balena_device_memory_used_bytes{", DEVICES), ("balena_device_service_download_ratio{", all)],
    );
}

/// Each service of each device runs, and its image of the next release is downloaded. The simulation takes too long for so many
/// installs, so their pages are made here.
fn update(cloud: &Cloud) {
    let [running, target] = cloud.change(|devices| {
        for device in devices.iter_mut() {
            set_target(device, "2.0.0");
            device["image_install"] = json!([]);
        }
        [running_release(&devices[0]), devices[0]["should_be_running__release"][0]["id"].as_u64().expect("a release")]
    });
    let row = move |id: u64| {
        let (device, service) = ((id - 1) / SERVICES + 1, (id - 1) % SERVICES);
        json!({
            "id": id, "device": { "__id": device }, "status": "Downloading", "download_progress": id % 100,
            "is_provided_by__release": [{ "id": target }],
            "installs__image": [{ "id": 100 + service,
                "is_a_build_of__service": [{ "service_name": format!("service-{service}") }] }],
        })
    };
    let runs = move |id: u64| {
        let install = |service| json!({ "installs__image": { "__id": 1 + service }, "is_provided_by__release": { "__id": running } });
        json!({ "id": id, "image_install": (0..SERVICES).map(install).collect::<Vec<_>>() })
    };
    cloud.intercept(move |seen, _| {
        let is_list = seen.target.starts_with("/v7/image_install?");
        if !is_list && !seen.target.contains("$expand=image_install") {
            return None;
        }
        let number = |before: &str| {
            let (_, rest) = seen.target.split_once(before).expect("a page");
            rest.split(|c: char| !c.is_ascii_digit()).next().expect("a part").parse::<u64>().expect("a number")
        };
        let (after, top) = (number("(id%20gt%20"), number("$top="));
        let ids = |count: u64| after + 1..=count.min(after + top);
        let rows: Vec<_> =
            if is_list { ids(SERVICES * DEVICES).map(row).collect() } else { ids(DEVICES).map(runs).collect() };
        let body = json!({ "d": rows }).to_string();
        Some(Reply::status(200, &[("Content-Type", "application/json; charset=utf-8")], body.as_bytes()))
    });
}

/// Two scrapers, who find so many of these samples, while the list and the state of the devices change.
fn limit_holds(cloud: &Cloud, expected: [(&str, u64); 2]) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let group = Cgroup::new("limit", LIMIT);
    let sidecar = sidecar(cloud).env("LISTEN_ADDRESS", "127.0.0.1:0").env("DEVICE_METRICS", "true");
    let sidecar = sidecar.env("REFRESH_RATE", "1h").env("DEVICE_REFRESH_RATE", "20s").env("SERVICE_LABELS", "true");
    let mut status = Status::of(group.as_ref().map_or_else(|| sidecar.start(), |group| sidecar.start_in(&group.0)));
    status.wait_until("all devices", |metrics| {
        expected.iter().all(|(name, count)| metrics.keys().filter(|key| key.starts_with(name)).count() as u64 == *count)
    });
    let (status_of, address) = (&status, status.address);
    let expected = [("balena_device_info{", DEVICES)].into_iter().chain(expected).collect::<Vec<_>>();
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..SCRAPES {
                    let (code, _, body) =
                        status_of.send("GET /metrics HTTP/1.1\r\nHost: x\r\nAccept-Encoding: gzip\r\n\r\n");
                    let mut text = String::new();
                    GzDecoder::new(&*body).read_to_string(&mut text).expect("a whole answer");
                    assert_eq!(code, 200, "{address}");
                    for (name, count) in &expected {
                        let samples = text.lines().filter(|line| line.starts_with(name)).count() as u64;
                        assert_eq!(samples, *count, "{name} of {address}");
                    }
                }
            });
        }
        for round in 1..=2 {
            cloud.change(|devices| {
                for device in devices.iter_mut().step_by(50) {
                    device["device_name"] = json!(format!("round {round}"));
                }
            });
            status_of.running.signal("HUP");
            status_of.running.wait_for_lines("updated balena.json", 1 + round);
        }
    });
    assert!(!status.running.has_ended(), "{}", status.running.log().join("\n"));
    let resident = resident(status.running.id());
    let charged = group.as_ref().map_or("nothing".into(), |group| format!("{} MiB", group.peak()));
    println!("peak: {resident} MiB resident, {charged} charged to a cgroup, of {LIMIT} MiB");
    assert!(resident < LIMIT);
}

/// The most memory that was resident, in MiB.
fn resident(process: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).expect("it runs");
    let peak =
        status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    peak.expect("VmHWM") >> 10
}

/// An answer that does not fit into memory is not read to its end: smaller pages are asked for instead.
#[test]
fn an_answer_is_bounded_by_the_memory_there_is() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(group) = Cgroup::new("answer", LIMIT) else { return };
    let cloud = Cloud::start(many(320));
    cloud.change(|devices| {
        for device in devices.iter_mut() {
            device["device_tag"] = json!([{ "tag_key": "note", "value": "x".repeat(30_000) }]);
        }
    });
    // 9.6 MB come in one page. The tags are too long for a label, so that the list is small.
    let sidecar = sidecar(&cloud).env("REFRESH_RATE", "1h");
    let running = sidecar.start_in(&group.0);
    running.wait_for("updated balena.json: 320 targets on 320 devices");
    let limits: Vec<_> = cloud
        .requests()
        .iter()
        .filter_map(|seen| seen.target.split_once("$top=")?.1.split('&').next()?.parse::<u64>().ok())
        .collect();
    assert!(limits.contains(&1000) && limits.iter().any(|limit| *limit < 300), "{limits:?}");
    println!("peak of the cgroup: {} MiB of {LIMIT} MiB", group.peak());
}
