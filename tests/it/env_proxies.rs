//! The proxies that the environment names, and the hosts that are reached without them. `network.rs` has what becomes of them in each
//! command.

use baletheus::net::{EnvProxies, EnvProxy};

fn proxies(set: &[(&str, &str)]) -> (EnvProxies, Vec<String>) {
    EnvProxies::from_env(&|name| set.iter().find(|(set, _)| *set == name).map(|(_, value)| value.into()))
}

fn find(proxies: &EnvProxies, host: &str) -> Option<EnvProxy> {
    proxies.find(&format!("https://{host}").parse().unwrap())
}

#[test]
fn no_proxy_excludes_hosts_and_networks() {
    for (entry, host, is_excluded) in [
        ("*", "a.test", true),
        ("*", "10.1.2.3", true),
        ("*", "[::1]", true),
        ("a.test", "a.test", true),
        ("A.Test.", "x.a.test", true),
        (".a.test", "x.a.test", true),
        ("*.a.test", "x.a.test", true),
        ("a.test", "ba.test", false),
        ("b.test, a.test", "a.test", true),
        ("b.test a.test", "a.test", true),
        (" * ", "a.test", true),
        ("10.0.0.0/8", "10.1.2.3", true),
        ("10.0.0.0/8", "11.1.2.3", false),
        ("0.0.0.0/0", "[::1]", false),
        ("::1", "[::1]", true),
        ("[::1]", "[::1]", true),
        ("fd00::/8", "[fd12::1]", true),
    ] {
        let (proxies, warnings) = proxies(&[("HTTPS_PROXY", "proxy.test:3128"), ("NO_PROXY", entry)]);
        assert_eq!(warnings, [""; 0], "{entry}");
        assert_eq!(find(&proxies, host).is_none(), is_excluded, "{entry} {host}");
    }
}

#[test]
fn a_proxy_that_cannot_be_used_is_a_warning_without_its_password() {
    for bad in ["socks5://u:secret@proxy.test", "http://u:secret@", "http://u:secret@ho st", "://secret"] {
        let (proxies, warnings) = proxies(&[("HTTPS_PROXY", bad)]);
        assert!(find(&proxies, "a.test").is_none(), "{bad}");
        assert!(matches!(&warnings[..], [one] if one.starts_with("HTTPS_PROXY ") && !one.contains("secret")), "{bad}");
    }
    let (found, warnings) =
        proxies(&[("https_proxy", "https://u:s%20t@proxy.test:8443"), ("NO_PROXY", "http://x,b.test:443")]);
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    let proxy = find(&found, "a.test").unwrap();
    assert_eq!(format!("{proxy} {proxy:?}").matches("u:").count(), 0);
    assert_eq!(proxy.to_string(), "https://proxy.test:8443 (https_proxy)");
    assert_eq!(proxy.uri(), "https://proxy.test:8443/");
    assert_eq!(proxy.authorization().unwrap(), "Basic dTpzIHQ=");
}
