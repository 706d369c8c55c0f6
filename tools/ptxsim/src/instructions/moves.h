#pragma once
#include "lower.h"
