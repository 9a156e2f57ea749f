//! The exporter of `examples/thingy`, with its own flags and with both lists of mounts that a container may find on a device.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::support::binary;
use crate::support::cloud::Cloud;
use crate::support::fleet::{demo_fleet, set_release};
use crate::support::grafana::{list, text};
use crate::support::node_exporter::{FULL, LEAN, OF_THE_CONTAINER, OF_THE_HOST, flags_of, start};
use crate::support::sidecar::{PATIENCE, Sidecar};
use serde_json::Value;

/// The page of the exporter with this profile and these mounts.
fn page(profile: &str, mounts: &str) -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let (_exporter, address) = start(profile, folder.path(), mounts);
    scrape(address)
}

fn scrape(address: SocketAddr) -> String {
    let deadline = Instant::now() + PATIENCE;
    // A test that installed one already may keep it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::blocking::Client::builder().no_proxy().build().expect("a client");
    loop {
        match client.get(format!("http://{address}/metrics")).send().and_then(|answer| answer.text()) {
            Ok(page) => return page,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The values of a metric by mount point.
fn by_mount_point<'a>(page: &'a str, metric: &str) -> BTreeMap<&'a str, f64> {
    let samples = page.lines().filter_map(|line| line.strip_prefix(metric)?.strip_prefix('{')?.rsplit_once("} "));
    let mount_point = |labels: &'a str| labels.split_once("mountpoint=\"").and_then(|(_, rest)| rest.split_once('"'));
    samples
        .map(|(labels, value)| (mount_point(labels).expect("a mount point").0, value.parse().expect("a number")))
        .collect()
}

/// The named volume is the data partition; nothing is listed that cannot be read.
#[test]
fn a_container_measures_the_data_partition_by_its_named_volume() {
    for (profile, all) in [(LEAN, &["/data"][..]), (FULL, &["/", "/data"])] {
        let page = page(profile, OF_THE_CONTAINER);
        let errors = by_mount_point(&page, "node_filesystem_device_error");
        assert_eq!(errors, all.iter().map(|mount_point| (*mount_point, 0.0)).collect());
        let sizes = by_mount_point(&page, "node_filesystem_size_bytes");
        assert!(sizes["/data"] > 0.0 && sizes.values().all(|size| *size == sizes["/data"]), "{sizes:?}");
        assert!(page.contains("node_filesystem_files_free{device=\"/dev/mmcblk0p6\","));
    }
}

/// A Raspberry Pi with an SD card and a USB disk: the partitions of a card would be three quarters of these samples.
#[test]
fn partitions_are_no_disks() {
    let folder = tempfile::tempdir().expect("a folder");
    let (_exporter, address) = start(LEAN, folder.path(), OF_THE_CONTAINER);
    let disks = [
        "ram0",
        "loop0",
        "sda",
        "sda1",
        "mmcblk0",
        "mmcblk0p1",
        "mmcblk0p6",
        "mmcblk0boot0",
        "nvme0n1",
        "nvme0n1p2",
        "zram0",
    ];
    let lines = disks.iter().map(|name| format!(" 1 0 {name} 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17\n"));
    let diskstats = folder.path().join("proc/diskstats");
    std::fs::remove_file(&diskstats).expect("the link to this machine's");
    std::fs::write(diskstats, lines.collect::<String>()).expect("written");
    let page = scrape(address);
    let metric = "node_disk_read_bytes_total{device=\"";
    let found: Vec<_> = page.lines().filter_map(|line| line.strip_prefix(metric)?.split('"').next()).collect();
    assert_eq!(found, ["mmcblk0", "nvme0n1", "sda"]);
}

/// With the label `io.balena.features.procfs`, which other services may need: no error for ever, and no false disk.
#[test]
fn mounts_of_the_host_are_no_errors() {
    for (profile, all) in [(LEAN, &[][..]), (FULL, &["/"])] {
        let page = page(profile, OF_THE_HOST);
        let errors = by_mount_point(&page, "node_filesystem_device_error");
        assert_eq!(errors, all.iter().map(|mount_point| (*mount_point, 0.0)).collect());
        assert!(by_mount_point(&page, "node_filesystem_size_bytes").keys().eq(all), "{page}");
    }
}

/// Another label value begins a new series, and the stack's memory has no room for each series twice.
#[test]
fn a_release_begins_no_series_anew_in_the_stack() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docker-compose.yml");
    let compose: Value = crate::support::alerts::read(&file);
    let labels = text(&compose["services"]["baletheus"]["environment"], "LABELS");
    let cloud = Cloud::start(demo_fleet());
    let sidecar = Sidecar::of(binary::path(), &cloud).env("LABELS", labels);
    let series = || -> Vec<(Value, Value)> {
        sidecar.oneshot();
        let mut groups: Value = serde_json::from_str(&sidecar.list()).expect("a target file");
        let groups = groups.as_array_mut().expect("a list").iter_mut().map(|group| {
            group["labels"].as_object_mut().expect("labels").retain(|name, _| !name.starts_with("__"));
            (group["targets"].take(), group["labels"].take())
        });
        groups.collect()
    };
    let before = series();
    cloud.change(|devices| devices.iter_mut().for_each(|device| set_release(device, "99.0.0")));
    assert_eq!(series(), before);
    assert!(before[0].1["fleet"].is_string(), "{:?}", before[0]);
}

/// As baletheus reads them, on a port that takes neither root nor a capability.
#[test]
fn the_example_declares_its_exporter_by_labels() {
    for (profile, job) in [(LEAN, "node"), (FULL, "node-full")] {
        let compose: Value = crate::support::alerts::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join(profile));
        let service = &compose["services"]["node-exporter"];
        let labels = &service["labels"];
        assert_eq!((text(labels, "prometheus.io.port"), text(labels, "prometheus.io.job")), ("9100", job));
        assert!(labels.get("io.balena.features.procfs").is_none(), "it would see the host's mounts");
        assert!(list(service, "/command").contains(&Value::from("--web.listen-address=:9100")));
        assert_eq!(service["cap_drop"], serde_json::json!(["ALL"]));
        assert!(service.get("user").is_none() && service.get("cap_add").is_none(), "the image's user is nobody");
        let volumes = list(service, "/volumes");
        assert!(
            volumes.contains(&Value::from("data:/data")) && compose["volumes"].get("data").is_some(),
            "{volumes:?}"
        );
    }
}

/// The monitoring device is measured as the others are.
#[test]
fn the_exporter_of_the_stack_is_that_of_the_example() {
    assert_eq!(flags_of("docker-compose.yml"), flags_of(LEAN));
}
