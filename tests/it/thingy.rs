//! The exporter of `examples/thingy`, with its own flags and with both lists of mounts that a container may find on a device.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::support::grafana::{list, text};
use crate::support::node_exporter::{OF_THE_CONTAINER, OF_THE_HOST, start};
use crate::support::sidecar::PATIENCE;
use serde_json::Value;

/// The page of the exporter with these mounts.
fn page(mounts: &str) -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let (_exporter, address) = start(folder.path(), mounts);
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
    let page = page(OF_THE_CONTAINER);
    assert_eq!(by_mount_point(&page, "node_filesystem_device_error"), [("/", 0.0), ("/data", 0.0)].into());
    let sizes = by_mount_point(&page, "node_filesystem_size_bytes");
    assert!(sizes.len() == 2 && sizes["/data"] > 0.0 && sizes["/"] == sizes["/data"], "{sizes:?}");
    assert!(page.contains(r#"node_filesystem_files_free{device="/dev/mmcblk0p6",fstype="ext4",mountpoint="/data"}"#));
}

/// With the label `io.balena.features.procfs`, which other services may need: no error for ever, and no false disk.
#[test]
fn mounts_of_the_host_are_no_errors() {
    let page = page(OF_THE_HOST);
    assert_eq!(by_mount_point(&page, "node_filesystem_device_error"), [("/", 0.0)].into());
    assert_eq!(by_mount_point(&page, "node_filesystem_size_bytes").keys().collect::<Vec<_>>(), [&"/"]);
}

/// As baletheus reads them, on a port that takes neither root nor a capability.
#[test]
fn the_example_declares_its_exporter_by_labels() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/thingy/docker-compose.yml");
    let compose: Value = crate::support::alerts::read(&file);
    let service = &compose["services"]["node-exporter"];
    let labels = &service["labels"];
    assert_eq!((text(labels, "prometheus.io.port"), text(labels, "prometheus.io.job")), ("9100", "node"));
    assert!(labels.get("io.balena.features.procfs").is_none(), "it would see the host's mounts");
    assert!(list(service, "/command").contains(&Value::from("--web.listen-address=:9100")));
    assert_eq!(service["cap_drop"], serde_json::json!(["ALL"]));
    assert!(service.get("user").is_none() && service.get("cap_add").is_none(), "the image's user is nobody");
    let volumes = list(service, "/volumes");
    assert!(volumes.contains(&Value::from("data:/data")) && compose["volumes"].get("data").is_some(), "{volumes:?}");
}
