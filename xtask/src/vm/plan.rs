//! Which tests run under which kernel.
//!
//! Under emulation everything takes ten times as long, most of all to have programs verified: of each thing that an older
//! kernel does in its own way there is a test here. `--long` runs all of them under each kernel.

use super::{Selection, Test};
use std::fmt;

/// The crates all of whose tests run here at length.
pub(super) const CRATES: [&str; 2] = ["flynn-dataplane", "flynn-overlay"];

/// What of a test program runs when there is not much time, and where.
pub(super) struct Quick {
    program: &'static str,
    under: Under,
    /// These of its tests; none are all.
    tests: &'static [&'static str],
}

/// The kernels.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Under {
    All,
    /// It has the least of what programs need.
    Oldest,
    /// It can do all that the host's daemon asks for.
    Newest,
}

const QUICK: [Quick; 9] = [
    Quick {
        program: "flynn-dataplane_objects",
        under: Under::All,
        tests: &[],
    },
    Quick {
        program: "flynn-hostd_escape",
        under: Under::Oldest,
        tests: &[],
    },
    Quick {
        program: "flynn-dataplane_pins",
        under: Under::Oldest,
        tests: &[
            "an_interface_that_vanished_is_forgotten_by_clsact",
            "programs_outlive_the_process_by_clsact",
        ],
    },
    Quick {
        program: "flynn-dataplane_lb",
        under: Under::Oldest,
        tests: &[
            "a_container_here_gets_it_translated",
            "another_host_gets_it_through_a_tunnel",
            "answers_go_back_as_asked",
            "too_big_is_answered",
            "xdp_sends_to_other_hosts",
        ],
    },
    Quick {
        program: "flynn-dataplane_lb_sockets",
        under: Under::Oldest,
        tests: &["a_container_of_another_host"],
    },
    Quick {
        program: "flynn-dataplane_steer",
        under: Under::Oldest,
        tests: &["datagrams_are_steered", "routed_ports_lead_to_one_socket"],
    },
    Quick {
        program: "flynn-dataplane_services",
        under: Under::Oldest,
        tests: &[
            "a_dead_instance_is_cut_off_and_others_are_not",
            "ipv6_and_mapped_addresses_lead_there_as_well",
            "unconnected_datagrams_are_right_both_ways",
        ],
    },
    Quick {
        program: "flynn-overlay_network",
        under: Under::Oldest,
        tests: &[
            "connections_outlive_the_daemon_and_its_successor",
            "containers_reach_one_another",
            "the_outside_does_not_reach_containers",
            "who_lies_about_its_address_is_dropped",
        ],
    },
    // Cgroups of version 2 alone, as users' hosts have them.
    Quick {
        program: "flynn-hostd_kernel",
        under: Under::Newest,
        tests: &[
            "an_update_is_noticed_by_nobody",
            "containers_outlive_the_daemon",
            "cores_weights_swap_and_disk_are_limited",
            "jobs_are_confined_and_the_platform_s_are_not",
            "limits_change_while_a_job_runs",
            "limits_memory",
            "limits_processes",
            "pauses_and_resumes",
            "want_is_told_and_use_is_counted",
        ],
    },
];

/// Tests that would take minutes each under emulation: without much time they run on this machine alone.
pub(super) const SLOW: [&str; 10] = [
    "updates_under_load",
    "kills_under_load",
    "a_disk_that_is_full_at_any_step",
    "cycles_leave_nothing",
    "survive_power_cuts",
    "survive_kills",
    "releases_survive_kills",
    "a_full_image",
    "a_full_subvolume",
    "are_sent_and_received",
];

/// A run of a test program in a machine.
#[derive(Clone, Copy)]
pub(super) struct Run<'b> {
    pub(super) test: &'b Test,
    /// This one of its tests alone.
    pub(super) only: Option<&'static str>,
}

impl fmt::Display for Run<'_> {
    /// As the machine's plan and its report have it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.test.name)?;
        self.only.map_or(Ok(()), |name| write!(f, " {name}"))
    }
}

/// Whether a test program runs here at all.
pub(super) fn knows(package: &str, program: &str) -> bool {
    CRATES.contains(&package) || QUICK.iter().any(|quick| quick.program == program)
}

/// What runs under a kernel: the `index`th of `kernels`, from old to new. Whoever names a program or asks for tests gets
/// them wherever they usually run.
pub(super) fn runs<'b>(
    tests: &'b [Test],
    selection: &Selection<'_>,
    index: usize,
    kernels: usize,
) -> Vec<Run<'b>> {
    let mut runs = Vec::new();
    for test in tests {
        let asked = match selection.program {
            Some(part) if test.name.contains(part) => true,
            Some(_) => continue,
            None => selection.long || selection.filter.is_some(),
        };
        if asked {
            runs.push(Run { test, only: None });
            continue;
        }
        for quick in QUICK.iter().filter(|quick| quick.program == test.name) {
            let here = match quick.under {
                Under::All => true,
                Under::Oldest => index == 0,
                Under::Newest => index + 1 == kernels,
            };
            if here && quick.tests.is_empty() {
                runs.push(Run { test, only: None });
            } else if here {
                runs.extend(quick.tests.iter().map(|only| Run {
                    test,
                    only: Some(only),
                }));
            }
        }
    }
    runs
}
