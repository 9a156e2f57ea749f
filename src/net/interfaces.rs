//! The addresses of this machine.

use std::io;

use ipnet::IpNet;

/// Each address of this machine, with its network.
///
/// # Errors
/// The system does not list them.
pub fn addresses() -> io::Result<Vec<IpNet>> {
    let interfaces = if_addrs::get_if_addrs()?;
    let network = |interface: &if_addrs::Interface| {
        let prefix = match &interface.addr {
            if_addrs::IfAddr::V4(address) => address.prefixlen,
            if_addrs::IfAddr::V6(address) => address.prefixlen,
        };
        IpNet::new(interface.ip(), prefix).ok()
    };
    Ok(interfaces.iter().filter_map(network).collect())
}
