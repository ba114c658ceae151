//! Which TCP routes are served, on which ports. Pure.

use std::collections::{BTreeMap, BTreeSet};

use flynn_api::route::{Route, RouteKind, system_port};

/// What becomes of the TCP routes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The ports to serve, with the service behind each, and whether only its leader is meant.
    pub served: BTreeMap<u16, (String, bool)>,
    /// The ports that cannot be had, and why.
    pub refused: BTreeMap<u16, String>,
}

impl Plan {
    /// For these routes, of which the first counts where two have one port, where others listen on `taken`.
    pub fn new(routes: &[Route], taken: &BTreeSet<u16>) -> Self {
        let mut plan = Self::default();
        for route in routes {
            if route.kind != RouteKind::Tcp || route.port == 0 {
                continue;
            }
            if let Some(owner) = system_port(route.port) {
                let why = format!("the port belongs to {owner}: choose another for the route");
                plan.refused.insert(route.port, why);
            } else if taken.contains(&route.port) {
                let why = "something else on this host listens on the port: stop it, or choose another for the route";
                plan.refused.insert(route.port, why.into());
            } else {
                plan.served
                    .entry(route.port)
                    .or_insert_with(|| (route.service.clone(), route.leader));
            }
        }
        plan
    }
}

/// The ports that sockets listen on, of a table as `/proc/net/tcp` and `tcp6` have it. Those which listen are the
/// first in it: reading ends with them.
pub fn listening<L: AsRef<str>>(lines: impl Iterator<Item = L>) -> impl Iterator<Item = u16> {
    lines.skip(1).map_while(|line| port_of_listener(line.as_ref()))
}

fn port_of_listener(line: &str) -> Option<u16> {
    const LISTEN: &str = "0A";
    let mut fields = line.split_ascii_whitespace();
    let (_, port) = fields.nth(1)?.rsplit_once(':')?;
    (fields.nth(1)? == LISTEN).then(|| u16::from_str_radix(port, 16).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tcp(port: u16, service: &str) -> Route {
        Route {
            kind: RouteKind::Tcp,
            service: service.into(),
            port,
            ..Route::default()
        }
    }

    #[test]
    fn ports_are_served_or_refused() {
        let http = Route {
            port: 80,
            ..Route::default()
        };
        let routes = [
            http,
            tcp(22, "a"),
            tcp(3000, "a"),
            tcp(3001, "b"),
            tcp(3000, "c"),
            tcp(0, "d"),
        ];
        let plan = Plan::new(&routes, &BTreeSet::from([3001, 4000]));
        assert_eq!(plan.served, BTreeMap::from([(3000, ("a".to_owned(), false))]));
        assert_eq!(plan.refused.keys().copied().collect::<Vec<_>>(), [22, 3001]);
        assert!(plan.refused[&22].contains("ssh"), "{:?}", plan.refused);
    }

    #[test]
    fn listeners_are_read_from_the_kernel_s_table() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid
   0: 0100007F:0BB8 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1
   1: 00000000000000000000000001000000:0016 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00
   2: 0100007F:0FA0 0100007F:1234 01 00000000:00000000 00:00000000 00000000     0        0 1 1
   3: 0100007F:0FA1 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1
";
        assert_eq!(listening(table.lines()).collect::<Vec<_>>(), [3000, 22]);
        assert_eq!(listening(std::iter::empty::<&str>()).count(), 0);
    }

    proptest! {
        #[test]
        fn no_table_is_too_odd(table in "[0-9A-F: \n]{0,200}|.*") {
            let _ = listening(table.lines()).count();
        }

        #[test]
        fn every_route_is_served_or_refused(
            ports in prop::collection::vec(1_u16.., 0..20), taken in prop::collection::btree_set(1_u16.., 0..20),
        ) {
            let routes: Vec<_> = ports.iter().map(|port| tcp(*port, "a")).collect();
            let plan = Plan::new(&routes, &taken);
            for port in ports {
                let served = plan.served.contains_key(&port);
                prop_assert_ne!(served, plan.refused.contains_key(&port));
                prop_assert_eq!(served, system_port(port).is_none() && !taken.contains(&port));
            }
        }
    }
}
