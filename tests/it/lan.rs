//! Which addresses of a device are scraped in a LAN. A device may report any.

use std::env;
use std::process::Command;

use crate::support::binary::sidecar;
use crate::support::cloud::Cloud;
use crate::support::fakes;
use crate::support::fleet::{gateways, set_tag};
use crate::support::sidecar::finish;
use crate::support::tools::installed;
use baletheus::balena::device;
use baletheus::discovery::lan::{Lan, networks};
use baletheus::discovery::left_out::{LeftOut, LeftOutReason};
use serde_json::json;

/// A container in the stack's network, a machine in a LAN, and one with IPv6.
const OWN: [&str; 3] = ["172.18.0.3/16", "192.168.1.5/24", "fd00::2/64"];

fn host(lan: &Lan, addresses: &str) -> Result<String, LeftOut> {
    let body = json!({ "d": [{ "id": 1, "ip_address": addresses }] }).to_string();
    let address = lan.address(&device::parse_page(body.as_bytes()).expect("a page")[0])?;
    Ok(if address.is_ipv6() { format!("[{address}]") } else { address.to_string() })
}

fn lan(named: &str) -> Lan {
    let own = OWN.iter().map(|text| text.parse().expect("an address with its network")).collect();
    Lan { networks: networks(named).expect("networks"), own, is_told: false }
}

fn default() -> Lan {
    Lan { own: lan("").own, ..fakes::lan() }
}

#[test]
fn private_carrier_grade_and_unique_local_addresses_are_taken() {
    for (addresses, taken) in [
        ("10.0.0.1", "10.0.0.1"),
        ("172.16.0.1", "172.16.0.1"),
        ("172.31.255.254", "172.31.255.254"),
        ("192.168.0.1", "192.168.0.1"),
        ("100.64.0.1", "100.64.0.1"),
        ("100.127.255.254", "100.127.255.254"),
        ("fd12:3456::1", "[fd12:3456::1]"),
        ("fc00::1", "[fc00::1]"),
        ("8.8.8.8 172.18.0.1 fd12:3456::1 10.0.0.1", "10.0.0.1"),
    ] {
        assert_eq!(host(&default(), addresses), Ok(taken.to_owned()), "{addresses}");
    }
}

#[test]
fn strangers_and_the_stack_itself_are_refused_with_the_reason() {
    for (address, why) in [
        ("8.8.8.8", "outside of --lan-network"),
        ("172.15.255.255", "outside of --lan-network"),
        ("172.32.0.1", "outside of --lan-network"),
        ("100.128.0.1", "outside of --lan-network"),
        ("192.0.2.1", "outside of --lan-network"),
        ("2606:4700::1111", "outside of --lan-network"),
        ("172.18.0.1", "in 172.18.0.0/16, a network of this machine that --lan-network does not name"),
        ("172.18.0.3", "this machine itself, which --lan-network does not name alone"),
        ("192.168.1.77", "in 192.168.1.0/24, a network of this machine that --lan-network does not name"),
        ("fd00::3", "in fd00::/64, a network of this machine that --lan-network does not name"),
    ] {
        let detail = format!("{address} ({why})").into();
        let expected = LeftOut { reason: LeftOutReason::LanAddressRefused, detail };
        assert_eq!(host(&default(), address), Err(expected));
    }
    let many = host(&default(), &"8.8.8.8 ".repeat(200)).expect_err("all are refused").detail;
    assert!(many.ends_with(" and 197 more") && many.len() < 200, "{many}");
}

/// Named or not.
#[test]
fn some_addresses_are_never_taken() {
    let all = lan("0.0.0.0/0,::/0");
    for address in [
        "0.0.0.0",
        "0.1.2.3",
        "127.0.0.1",
        "127.1.2.3",
        "169.254.169.254",
        "224.0.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::ffff:10.0.0.1",
        "::10.0.0.1",
        "64:ff9b::10.0.0.1",
        "64:ff9b:1::1",
        "2001::1",
        "2002:a00:1::1",
        "fe80::1",
        "fec0::1",
        "ff02::1",
        // the metadata services of AWS, Google Cloud, Alibaba Cloud, Azure and Oracle Cloud
        "fd00:ec2::254",
        "fd20:ce::254",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
    ] {
        assert_eq!(host(&all, address), Err(LeftOutReason::NoLanAddress.into()), "{address}");
    }
    assert_eq!(host(&all, "203.0.113.7"), Ok("203.0.113.7".into()));
    assert_eq!(host(&all, "2001:db8::7"), Ok("[2001:db8::7]".into()));
}

/// No host has the address of a network or its broadcast address, as far as the network is known.
#[test]
fn network_and_broadcast_addresses_are_refused() {
    for address in ["10.0.0.0", "10.255.255.255", "192.168.1.0", "192.168.1.255", "172.18.255.255", "fc00::"] {
        assert_eq!(host(&default(), address), Err(LeftOutReason::NoLanAddress.into()), "{address}");
    }
    let named = lan("192.168.7.0/24,192.168.8.0/31,192.168.9.9/32");
    for (address, is_taken) in [
        ("192.168.7.0", false),
        ("192.168.7.255", false),
        ("192.168.7.254", true),
        ("192.168.8.0", true),
        ("192.168.8.1", true),
        ("192.168.9.9", true),
    ] {
        assert_eq!(host(&named, address).is_ok(), is_taken, "{address}");
    }
}

/// Where the machine is in the LAN of the devices, its network has to be named. A wider one does not name it.
#[test]
fn a_network_of_this_machine_is_taken_where_it_or_a_part_of_it_is_named() {
    for (named, address, is_taken) in [
        ("192.168.1.0/24", "192.168.1.77", true),
        ("192.168.1.64/26", "192.168.1.77", true),
        ("192.168.1.64/26", "192.168.1.7", false),
        ("192.168.0.0/16", "192.168.1.77", false),
        ("192.168.0.0/16", "192.168.2.77", true),
        ("172.16.0.0/12,192.168.1.0/24", "172.18.0.1", false),
        ("192.168.1.0/24", "192.168.1.5", false),
        ("192.168.1.0/24,192.168.1.5/32", "192.168.1.5", true),
        ("fd00::/64", "fd00::7", true),
        ("fd00::/64", "fd00::2", false),
        ("fd00::2/128", "fd00::2", true),
    ] {
        assert_eq!(host(&lan(named), address).is_ok(), is_taken, "{address} with {named}");
    }
}

#[test]
fn a_network_that_no_device_is_in_is_a_mistake() {
    for (text, said) in [
        ("192.168.1.0", "no network such as 192.168.1.0/24"),
        ("192.168.1.0/33", "no network such as"),
        ("192.168.1.7/24", "the network is 192.168.1.0/24"),
        ("127.0.0.0/8", "within 127.0.0.0/8, which no device is in"),
        ("fe80::/64", "within fe80::/10"),
        ("lan", "\"lan\" is no network"),
    ] {
        let cloud = Cloud::start(Vec::new());
        let sidecar = sidecar(&cloud).env("TARGET_ADDRESS", "lan");
        let mut command = sidecar.command();
        command.args(["--dry-run", "--lan-network", text]);
        let run = finish(command);
        let log = String::from_utf8(run.stderr).expect("UTF-8");
        assert!(
            run.status.code() == Some(2) && log.contains("--lan-network is") && log.contains(said),
            "{text}: {log}"
        );
    }
}

/// The addresses of the machine that the program runs on, whatever they are.
#[test]
fn the_program_knows_its_own_networks() {
    let own = if_addrs::get_if_addrs().expect("addresses").into_iter().map(|interface| interface.ip());
    let Some(own) = own.into_iter().find(|own| networks(&format!("{own}/32")).is_ok()) else { return };
    let device = json!({ "id": 1, "uuid": "0".repeat(32), "device_name": "thief", "ip_address": own.to_string() });
    let cloud = Cloud::start(vec![device]);
    let sidecar = sidecar(&cloud).env("TARGET_ADDRESS", "lan").env("LAN_NETWORKS", "0.0.0.0/0");
    let mut command = sidecar.command();
    command.arg("check");
    let run = finish(command);
    let [table, log] = [run.stdout, run.stderr].map(|bytes| String::from_utf8(bytes).expect("UTF-8"));
    assert!(
        table.contains(&format!("left out: none of its addresses may be scraped: {own} (this machine itself")),
        "{table}{log}"
    );
    assert!(table.contains("name it with --lan-network (LAN_NETWORKS), or use --address vpn"), "{table}");
}

#[test]
fn one_address_of_two_devices_is_that_of_the_one_that_is_online() {
    let cloud = Cloud::start(gateways(3));
    let set = |states: [bool; 2]| {
        cloud.change(|devices| {
            for (device, address) in devices.iter_mut().zip(["10.1.0.7", "10.1.0.7", "10.1.0.8"]) {
                device["ip_address"] = address.into();
                device["is_connected_to_vpn"] = true.into();
            }
            for (device, state) in devices.iter_mut().zip(states) {
                device["is_connected_to_vpn"] = state.into();
            }
        });
    };
    set([false, true]);
    let sidecar = sidecar(&cloud).args(["--address", "lan", "--exporter", "node:9100"]);
    let running = sidecar.start();
    running.wait_for("updated balena.json: 2 targets on 2 devices (devices: +2 -0 ~0), 1 device left out");
    running.wait_for("left out gw-1 (0000000): another device has its address now: that one is online, and it is not");
    let line = running.wait_for("WARN  2 devices report the address 10.1.0.7 (gw-1 (0000000), gw-2 (0000000)): ");
    assert!(line.ends_with(": only the one that is online is scraped"), "{line}");
    for (states, targets) in [([true, true], 3), ([true, false], 2), ([false, false], 3)] {
        set(states);
        running.wait_for(&format!("updated balena.json: {targets} targets on {targets} devices"));
        let first = sidecar.list().matches("gw-1").count();
        assert_eq!(first > 0, states[0] || !states[1], "{states:?}");
    }
}

/// The one that is online is no target, or not at this address.
#[test]
fn an_address_is_taken_by_a_device_that_is_no_target_there() {
    let mut devices = gateways(6);
    let all = ["10.1.0.7", "10.1.0.7", "10.1.0.8", "10.1.0.9 10.1.0.8", "10.1.0.10", "10.1.0.11 10.1.0.10"];
    for (index, (device, addresses)) in devices.iter_mut().zip(all).enumerate() {
        device["ip_address"] = addresses.into();
        device["is_connected_to_vpn"] = (index % 2 == 1).into();
    }
    set_tag(&mut devices[1], "prometheus.io/scrape", "false");
    // One that nobody has seen may be there, as long as nobody else is known to be.
    devices[5]["is_connected_to_vpn"] = json!(null);
    let cloud = Cloud::start(devices);
    let sidecar = sidecar(&cloud).args(["--address", "lan", "--exporter", "node:9100"]);
    let log = sidecar.oneshot();
    let targets = ["10.1.0.9", "10.1.0.10", "10.1.0.11"].map(|address| format!("[\"{address}:9100\"]"));
    let list = sidecar.list();
    assert!(list.lines().count() == 5 && targets.iter().all(|target| list.contains(target)), "{list}");
    assert_eq!(log.matches("another device has its address now").count(), 2, "{log}");
    assert_eq!(log.matches(": what is not online is not scraped there").count(), 2, "{log}");
}

/// It runs again in a network namespace, so that the machine keeps its addresses.
#[test]
fn the_own_addresses_are_read_at_each_refresh() {
    const INSIDE: &str = "IN_A_NETWORK_OF_ITS_OWN";
    installed("ip", "iproute2");
    if env::var_os(INSIDE).is_none() {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--net"]).arg(env::current_exe().unwrap()).env(INSIDE, "1");
        command.args(["--exact", "lan::the_own_addresses_are_read_at_each_refresh", "--nocapture"]);
        let output = command.output().expect("`unshare`: install the package util-linux");
        let text = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
        return;
    }
    let ip = |args: &str| assert!(Command::new("ip").args(args.split(' ')).status().unwrap().success(), "ip {args}");
    ip("link set lo up");
    let mut devices = gateways(2);
    devices[0]["ip_address"] = json!("10.7.0.9");
    devices[1]["ip_address"] = json!("10.8.0.9");
    let cloud = Cloud::start(devices);
    let sidecar = sidecar(&cloud).args(["--address", "lan"]);
    let running = sidecar.start();
    running.wait_for("updated balena.json: 2 targets on 2 devices");
    ip("address add 10.7.0.5/24 dev lo");
    running.wait_for(
        "left out gw-1 (0000000): none of its addresses may be scraped: 10.7.0.9 (in 10.7.0.0/24, a network of this",
    );
    ip("address del 10.7.0.5/24 dev lo");
    running.wait_for_lines("updated balena.json: 2 targets on 2 devices", 1);
}
